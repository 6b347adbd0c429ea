"""Between the full width [T, D] and the compact layout [T, K*C], without autograd's scatter.

Gathering and scattering are each other's transpose. Under torch.compile both are written as pointwise reads, which fuse
into the norm or the residual beside them (an index_put would not); in eager mode as reads of whole rows of C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_rows(x: Tensor, parts: int) -> Tensor:
    """[T, parts * C] as [T * parts, C].

    By way of [T, parts, C]: code generated for whole rows of C is vectorized, for an index divided by C it is not.
    """
    return x.unflatten(1, (parts, -1)).flatten(0, 1)


def _take(full_TD: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    tokens, sub_dims = slots_TN.shape
    return as_rows(full_TD, sub_dims).index_select(0, rows).unflatten(0, (tokens, -1)).flatten(1)


def _place(compact_TKC: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    tokens, sub_dims = slots_TN.shape
    active = rows.shape[0] // tokens
    compact = as_rows(compact_TKC, active)
    if torch.compiler.is_compiling():
        pair = slots_TN.clamp(min=0) + torch.arange(tokens, device=rows.device).unsqueeze(1) * active
        full = compact.index_select(0, pair.view(-1)).view(tokens, sub_dims, -1)
        return torch.where(slots_TN.unsqueeze(-1) >= 0, full, 0).flatten(1)
    # A read, from a row of zeros for what is inactive: CUDA's deterministic mode would sort the rows of a write
    pair = slots_TN + torch.arange(tokens, device=rows.device).unsqueeze(1) * active
    pair = torch.where(slots_TN >= 0, pair, tokens * active)
    padded = torch.cat([compact, compact.new_zeros(1, compact.shape[1])])
    return padded.index_select(0, pair.view(-1)).view(tokens, -1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full_TD: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots_TN)
        return _take(full_TD, rows, slots_TN)

    @staticmethod
    def backward(ctx: Any, grad_TKC: Tensor) -> tuple[Tensor, None, None]:
        return _place(grad_TKC, *ctx.saved_tensors), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compact_TKC: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots_TN)
        return _place(compact_TKC, rows, slots_TN)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return _take(grad_TD, *ctx.saved_tensors), None, None


def gather_active(x_TD: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    """Every token's active sub-dimensions, slot by slot: [T, D] -> [T, K*C]."""
    if not torch.is_grad_enabled():  # spares decoding the cost of autograd's bookkeeping
        return _take(x_TD, rows, slots_TN)
    return _Gather.apply(x_TD, rows, slots_TN)


def scatter_active(z_TKC: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    """Slots in their sub-dimensions' places, 0 elsewhere: [T, K*C] -> [T, D]."""
    return _Scatter.apply(z_TKC, rows, slots_TN)
