"""Measuring a real training step on the CPU: every byte that torch's allocator hands out, as its profiler records it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from composer.optim import DecoupledAdamW
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.profiler import ProfilerActivity, profile

from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import ModelConfig, MoHDSettings, SubDimensionConfig
from mohd_train.estimate.activations import autocast, counting_saved, trace
from mohd_train.estimate.memory import MemoryModel, Sharding
from mohd_train.model.count import count
from mohd_train.model.llama import Transformer

HALF, X2 = SubDimensionConfig(4, 2, 1), SubDimensionConfig(8, 4, 3)
SETTINGS = {
    "dense": MoHDSettings(),
    "50": MoHDSettings("50", 1, HALF, HALF),
    "x2": MoHDSettings("x2", 2, X2, X2),
    "ffn only, no fusion": MoHDSettings("ffn", 1, None, HALF, fusion="none", gate_input=True),
    "random monarch": MoHDSettings("rm", 1, HALF, HALF, fusion="monarch", routing="random"),
}


def small_plan(
    setting: str,
    hidden: int = 128,
    ffn: int = 256,
    layers: int = 4,
    vocab: int = 512,
    seq: int = 128,
    kv_heads: int = 4,
) -> ModelPlan:
    """A model of a few million parameters whose activations outweigh them."""
    model = ModelConfig("small", hidden, ffn, layers, 4, kv_heads, 32, vocab)
    return make_plan(model, SETTINGS[setting], seq)


@dataclass
class Measured:
    """Bytes: what stands (weights, gradients, optimizer), and the peak above it in a whole step."""

    standing: int
    above: int

    @property
    def peak(self) -> int:
        return self.standing + self.above


def losses(model: Transformer, tokens: torch.Tensor, precision: str) -> torch.Tensor:
    with autocast(precision):
        out = model(tokens, labels_BT=tokens, logits=False)
    assert out.cross_entropy is not None
    return out.cross_entropy + out.balance_loss


def saved_bytes(plan: ModelPlan, samples: int, precision: str) -> int:
    """What a real forward pass keeps for backward."""
    model, tokens = Transformer(plan, seed=0), torch.randint(plan.vocab_size, (samples, plan.max_seq_len))
    with counting_saved(model) as saved:
        losses(model, tokens, precision)
        return saved()


def measure_step(plan: ModelPlan, samples: int, precision: str, *, checkpointing: bool = False) -> Measured:
    """The peak of a step that finds gradients and optimizer state already there, as every microbatch but the first does."""
    model, tokens = Transformer(plan, seed=0), torch.randint(plan.vocab_size, (samples, plan.max_seq_len))
    if checkpointing:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = checkpoint_wrapper(block)
    optimizer = DecoupledAdamW(model.parameters())
    losses(model, tokens, precision).backward()
    optimizer.step()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        losses(model, tokens, precision).backward()
        optimizer.step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = above = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        above = max(above, now)
    parameters = list(model.parameters())
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return Measured(sum(tensor.nbytes for tensor in tensors), above)


def memory_of(plan: ModelPlan, samples: int, precision: str, *, checkpointing: bool = False) -> MemoryModel:
    """The estimate's model of the same step."""
    return MemoryModel(
        plan=plan,
        counts=count(plan),
        saved=trace(plan, precision, gpu=False),
        sharding=Sharding(1, None, False, checkpointing),
        precision=precision,
        optimizer="decoupled_adamw",
        device_batch=2 * samples,
        eval_batch=1,
    )
