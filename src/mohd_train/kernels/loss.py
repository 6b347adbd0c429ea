"""Cross-entropy from hidden states and the head's weight, without holding all [T, V] logits at once.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from mohd_train.errors import UserError

CHUNK_LOGITS = 1 << 25  # logits in a chunk: 128 MiB in float32, 1024 tokens at V = 32768
SUM = 2  # aten's code for reduction="sum"
LEAST_LIGER = "0.6.2"  # the first version that lets the caller choose the dtype in which the head's gradient is summed


@torch.compiler.assume_constant_result  # called at every step; compiled code holds the answer
def loss_name(kind: str, dtype: torch.dtype) -> str:
    """What computes the loss of hidden states of this dtype on a kind of device ("cuda", "cpu"): "liger 0.8.5" or "chunked".

    Raises:
        UserError: the installed `liger-kernel` rounds its sum of the head's gradient to bfloat16 after every chunk.
    """
    version = _liger_version() if kind == "cuda" and dtype != torch.float64 else None
    if version is None:
        return "chunked"
    if Version(version) < Version(LEAST_LIGER):
        raise UserError(
            f"liger-kernel {version} sums the head's gradient in bfloat16; install 'liger-kernel>={LEAST_LIGER}', or uninstall it"
        )
    return f"liger {version}"


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, *, ignore_index: int = -100, chunk_tokens: int | None = None
) -> Tensor:
    """Mean of ``cross_entropy(hidden @ head.T, labels)`` over the labels that are not `ignore_index`; NaN if there are none.

    Liger's fused kernel on CUDA where `liger-kernel` is installed (`loss_name`), otherwise chunks of `chunk_tokens`.
    Under autocast the product runs in autocast's dtype and the softmax in float32, as with `F.linear` and `F.cross_entropy`.
    Both compute the gradients in the forward pass: a chunk's logits are computed once and discarded, and the head's gradient is
    summed over the chunks in float32.

    Returns:
        A scalar, float32 (float64 for float64 input).
    """
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_TD, head_VD = hidden_TD.to(dtype), head_VD.to(dtype)
    if chunk_tokens is None and loss_name(kind, hidden_TD.dtype) != "chunked":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        with torch.autocast(kind, enabled=False):
            fused = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, accum_dtype=torch.float32)
            return fused(head_VD, hidden_TD, labels_T).float()
    step = chunk_tokens or max(1, CHUNK_LOGITS // head_VD.shape[0])
    return _ChunkedCrossEntropy.apply(hidden_TD, head_VD, labels_T, ignore_index, step)


@functools.cache
def _liger_version() -> str | None:
    """None where the package (the `gpu` extra) is not installed."""
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed along with the loss; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, ignore_index: int, step: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
        count = (labels != ignore_index).sum().to(wide)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], step):
                rows, label = hidden[start : start + step], labels[start : start + step]
                logs = torch.log_softmax((rows @ head.t()).to(wide), 1)
                loss, counted = torch.ops.aten.nll_loss_forward(logs, label, None, SUM, ignore_index)
                total += loss
                if grad_hidden is None and grad_head is None:
                    continue
                # Autograd's own ops rather than a scatter, which becomes a sort on CUDA in deterministic mode
                slope = torch.ops.aten.nll_loss_backward(1 / count, logs, label, None, SUM, ignore_index, counted)
                slope = torch.ops.aten._log_softmax_backward_data(slope, logs, 1, wide).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(slope, head, out=grad_hidden[start : start + step])
                if grad_head is not None:
                    grad_head += slope.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * grad).to(ctx.head_dtype),
            None,
            None,
            None,
        )
