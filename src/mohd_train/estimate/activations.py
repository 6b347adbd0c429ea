"""What a training step saves for its backward pass, found by running the model's own code on tensors without memory.

Nothing here knows the layers: torch's fake tensors go through :class:`Transformer`, autocast and the sparse kernels as in a run,
and a hook counts what autograd saves, so the numbers follow the code. They are affine in the number of layers and of samples, so
four small traces suffice.
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
from mohd_train.kernels.selection import paths_as_on
from mohd_train.model.llama import Transformer

COMPUTE_BYTES = {"amp_bf16": 2, "amp_fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class SavedBytes:
    """Bytes saved in the forward pass for the backward pass, parameters not counted.

    Attributes:
        fixed: outside the blocks (embedding, last norm, loss), whatever the batch: mostly the head's gradient, which is computed
            with the loss.
        per_sample: outside the blocks, for each sample.
        block_fixed: in one block: its weights in the compute dtype, which autocast makes and autograd saves.
        block_per_sample: activations of one block, for each sample.
        block_input: the part of them that is the block's input: all that is kept with activation checkpointing.
    """

    fixed: int
    per_sample: int
    block_fixed: int
    block_per_sample: int
    block_input: int

    def block(self, samples: int) -> int:
        """In one block."""
        return self.block_fixed + samples * self.block_per_sample

    def ends(self, samples: int) -> int:
        """In everything but the blocks."""
        return self.fixed + samples * self.per_sample

    def total(self, layers: int, samples: int) -> int:
        """In the whole model."""
        return self.ends(samples) + layers * self.block(samples)


@contextlib.contextmanager
def counting_saved(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes saved for the backward pass so far: each storage once, without the parameters of
    ``module``.

    What is saved stays alive until the context ends, so that no address is used twice.
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
    """Composer's precision context on a CPU. bfloat16 stands for both half precisions, which take the same memory."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=COMPUTE_BYTES[precision] == 2)


class _FlashAttention(torch.autograd.Function):
    """Saves what flash attention saves: queries, keys, values, the output and the log-sum-exp. Computes nothing."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y_BHTE = torch.empty_like(q_BHTE)
        ctx.save_for_backward(q_BHTE, k, v, y_BHTE, q_BHTE.new_empty(q_BHTE.shape[:3], dtype=torch.float32))
        return y_BHTE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("a trace has no backward pass")


class _GroupedQueriesAsOnGPU(TorchFunctionMode):
    """On a GPU flash attention supports grouped queries; on a CPU it does not, and torch would fall back to saving all T x T
    scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            return _FlashAttention.apply(*args)
        return func(*args, **kwargs)


def _trace(plan: ModelPlan, layers: int, samples: int, precision: str, kernels: str, gpu: bool) -> int:
    flash = gpu and COMPUTE_BYTES[precision] == 2  # in float32 a GPU has no flash attention either
    as_there = paths_as_on("cuda") if gpu and kernels != "triton" else contextlib.nullcontext()
    kernels = "grouped" if kernels == "triton" else kernels
    with FakeTensorMode(), as_there, _GroupedQueriesAsOnGPU() if flash else contextlib.nullcontext():
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
        kernels: as in the config; ``triton`` is traced as ``grouped`` on a CPU, which saves the same tensors.
        gpu: whether attention and the sparse products run as on a GPU; a CPU's differ where query heads share keys, and in the
            path of the products.
    """
    points = {(n, b): _trace(plan, n, b, precision, kernels, gpu) for n in (1, 2) for b in (1, 2)}
    block = {b: points[2, b] - points[1, b] for b in (1, 2)}
    ends = {b: points[1, b] - block[b] for b in (1, 2)}
    per_sample, block_per_sample = ends[2] - ends[1], block[2] - block[1]
    return SavedBytes(
        fixed=ends[1] - per_sample,
        per_sample=per_sample,
        block_fixed=block[1] - block_per_sample,
        block_per_sample=block_per_sample,
        block_input=plan.max_seq_len * plan.hidden_size * 4,  # the residual stream is float32, like the embedding
    )
