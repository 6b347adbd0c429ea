"""What a training step keeps for its backward pass, found by running the model's own code on tensors without memory.

Nothing here knows the layers: torch's fake tensors go through :class:`Transformer`, autocast and the sparse kernels as in a run,
and a hook sees what autograd saves. So the figures follow the code. They are affine in layers and in samples, so four small traces
suffice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mohd_train.config.plan import ModelPlan
from mohd_train.model.llama import Transformer

COMPUTE_BYTES = {"amp_bf16": 2, "amp_fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class SavedBytes:
    """Bytes kept from the forward to the backward pass; parameters, which live anyway, are not among them.

    Attributes:
        fixed: of the ends (embedding, last norm, loss), whatever the batch: mostly the head's gradient, made with the loss.
        per_sample: of the ends, for each sample.
        block_fixed: of one block: its weights in the compute dtype, which autocast makes and autograd keeps.
        block_per_sample: activations of one block, for each sample.
        block_input: of them, the input: all that stays with activation checkpointing.
    """

    fixed: int
    per_sample: int
    block_fixed: int
    block_per_sample: int
    block_input: int

    def block(self, samples: int) -> int:
        """Of one block."""
        return self.block_fixed + samples * self.block_per_sample

    def ends(self, samples: int) -> int:
        """Of everything but the blocks."""
        return self.fixed + samples * self.per_sample

    def total(self, layers: int, samples: int) -> int:
        """Of the whole model."""
        return self.ends(samples) + layers * self.block(samples)


@contextlib.contextmanager
def counting_saved(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Within it, a call of what it gives returns the bytes of the storages saved for backward so far, each counted once.

    Parameters of ``module`` don't count. What is saved stays alive until the end, so that no storage's place is used twice.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: list[Tensor] = []
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept.append(tensor)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def autocast(precision: str) -> Any:
    """Composer's precision context, as a CPU knows it: bfloat16 stands for either half precision, whose sizes are equal."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=COMPUTE_BYTES[precision] == 2)


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention does: queries, keys, values, their result and the log-sum-exp. It computes nothing."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y_BHTE = torch.empty_like(q_BHTE)
        ctx.save_for_backward(q_BHTE, k, v, y_BHTE, q_BHTE.new_empty(q_BHTE.shape[:3], dtype=torch.float32))
        return y_BHTE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("a trace has no backward pass")


class _GroupedQueriesAsOnGPU(TorchFunctionMode):
    """A GPU's flash attention takes grouped queries; a CPU's does not, and torch falls back to keeping all T x T scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            return _FlashAttention.apply(*args)
        return func(*args, **kwargs)


def _trace(plan: ModelPlan, layers: int, samples: int, precision: str, kernels: str, gpu: bool) -> int:
    flash = gpu and COMPUTE_BYTES[precision] == 2  # in float32 a GPU has none either
    with FakeTensorMode(), _GroupedQueriesAsOnGPU() if flash else contextlib.nullcontext():
        model = Transformer(dataclasses.replace(plan, num_hidden_layers=layers), kernels, seed=0)
        tokens = torch.zeros(samples, plan.max_seq_len, dtype=torch.int64)
        with counting_saved(model) as saved, autocast(precision):
            out = model(tokens, labels_BT=tokens, logits=False)
            assert out.cross_entropy is not None
            return saved()


def trace(plan: ModelPlan, precision: str, kernels: str = "auto", *, gpu: bool = True) -> SavedBytes:
    """Bytes saved for backward at the plan's sequence length.

    Args:
        plan: the model.
        precision: ``amp_bf16``, ``amp_fp16`` or ``fp32``.
        kernels: as in the config; ``triton`` is traced as ``grouped``, since it saves the same tensors and refuses a CPU.
        gpu: whether attention is a GPU's: it differs from a CPU's where query heads share keys.
    """
    kernels = "grouped" if kernels == "triton" else kernels
    points = {(n, b): _trace(plan, n, b, precision, kernels, gpu) for n in (1, 2) for b in (1, 2)}
    block = {b: points[2, b] - points[1, b] for b in (1, 2)}
    ends = {b: points[1, b] - block[b] for b in (1, 2)}
    per_sample, block_per_sample = ends[2] - ends[1], block[2] - block[1]
    return SavedBytes(
        fixed=ends[1] - per_sample,
        per_sample=per_sample,
        block_fixed=block[1] - block_per_sample,
        block_per_sample=block_per_sample,
        block_input=plan.max_seq_len * plan.hidden_size * 4,  # the residual stream is float32, as the embedding
    )
