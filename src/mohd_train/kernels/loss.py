"""Cross-entropy from hidden states and the head's weight: the [T, V] logits never exist at once.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 1 << 25  # logits of a chunk: 128 MiB in float32, 1024 tokens at V = 32768


def linear_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean of ``cross_entropy(hidden @ head.T, labels)`` over the labels that are not `ignore_index`; NaN if there are none.

    Liger's fused kernel on CUDA where `liger-kernel` is installed (not for float64), chunks of `chunk_tokens` elsewhere.
    Under autocast the product runs in its dtype and the softmax in float32, as `F.linear` and `F.cross_entropy` would.
    Both compute the gradients in the forward pass: a chunk's logits are made once and dropped.

    Returns:
        A scalar, float32 (float64 for float64 input).
    """
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_TD, head_VD = hidden_TD.to(dtype), head_VD.to(dtype)
    if kind == "cuda" and hidden_TD.dtype != torch.float64 and chunk_tokens is None and (liger := _liger()) is not None:
        with torch.autocast(kind, enabled=False):
            return liger(ignore_index=ignore_index)(head_VD, hidden_TD, labels_T).float()
    step = chunk_tokens or max(1, CHUNK_LOGITS // head_VD.shape[0])
    return _ChunkedCrossEntropy.apply(hidden_TD, head_VD, labels_T, ignore_index, step)


@cache
def _liger() -> Any:
    """Liger's module class, or None where the package is not installed (it is an extra: `pip install mohd_train[gpu]`)."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are worked out with the loss and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, ignore_index: int, step: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
        count = (labels != ignore_index).sum()
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], step):
                rows, label = hidden[start : start + step], labels[start : start + step]
                logits = (rows @ head.t()).to(wide)
                total += F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
                if grad_hidden is None and grad_head is None:
                    continue
                kept = (label != ignore_index).unsqueeze(1)
                slope = torch.softmax(logits, 1)
                slope.scatter_add_(1, label.where(kept[:, 0], 0).unsqueeze(1), -torch.ones_like(slope[:, :1]))
                slope = slope.mul_(kept.to(wide) / count).to(hidden.dtype)
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
