"""From sub-dimensions to slots and back: the scores, counts and activations of a choice [T, K], without scatters.

Slot k of a token holds the k-th sub-dimension that it chose. Activations in slots are compact, [T, K*C]; as rows [T*K, C], a
compact tensor holds slot k of token t in row ``t * K + k``.

In deterministic mode CUDA turns `scatter`, `scatter_add`, `index_put`, `index_add`, `index_copy` and the gradient of `gather`
into sorts that also wait for the host. So what would be a write by index is a read through the inverse map here. That map
comes from comparing indices, which fuses with its neighbors under torch.compile, or from a binary search where there are many.

Shapes: T tokens, D hidden, N sub-dimensions, K chosen per token, C = D / N.
The indices in a row ascend, without duplicates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_COMPARED = 256  # the largest K * N for which every index is compared with every sub-dimension


def slots_of(indices_TK: Tensor, sub_dims: int) -> Tensor:
    """int64 [T, N]: the slot k that holds a sub-dimension, -1 where it was not chosen."""
    (tokens, active), device = indices_TK.shape, indices_TK.device
    ids = torch.arange(sub_dims, device=device)
    if active == 0:
        return torch.full((tokens, sub_dims), -1, dtype=torch.int64, device=device)
    if active * sub_dims <= MOST_COMPARED:
        numbers = torch.arange(1, active + 1, device=device)
        return ((indices_TK.unsqueeze(2) == ids) * numbers.unsqueeze(1)).sum(1) - 1
    wanted = ids.expand(tokens, sub_dims).contiguous()
    slots = torch.searchsorted(indices_TK.contiguous(), wanted).clamp(max=active - 1)
    return torch.where(indices_TK.gather(1, slots) == wanted, slots, -1)


class _GatherScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TN: Tensor, indices_TK: Tensor) -> Tensor:
        ctx.save_for_backward(indices_TK)
        ctx.sub_dims = scores_TN.shape[1]
        return scores_TN.gather(1, indices_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:
        (indices_TK,) = ctx.saved_tensors
        slots_TN = slots_of(indices_TK, ctx.sub_dims)
        grad_TN = grad_TK.gather(1, slots_TN.clamp(min=0))
        return torch.where(slots_TN >= 0, grad_TN, 0), None


def gather_scores(scores_TN: Tensor, indices_TK: Tensor) -> Tensor:
    """``scores.gather(1, indices)`` [T, K], K > 0, whose gradient is a read through `slots_of` instead of a scatter."""
    if not torch.is_grad_enabled():
        return scores_TN.gather(1, indices_TK)
    return _GatherScores.apply(scores_TN, indices_TK)


def count_selected(indices_TK: Tensor, sub_dims: int, token_mask_T: Tensor | None = None) -> Tensor:
    """How many tokens chose each sub-dimension: int64 [N], without those where `token_mask_T` (bool [T]) is False."""
    ids = torch.arange(sub_dims, device=indices_TK.device)
    if indices_TK.shape[1] * sub_dims <= MOST_COMPARED:
        chosen = indices_TK.unsqueeze(2) == ids
        if token_mask_T is not None:
            chosen = chosen & token_mask_T[:, None, None]
        return chosen.sum((0, 1))
    if token_mask_T is not None:
        indices_TK = torch.where(token_mask_T.unsqueeze(1), indices_TK, sub_dims)
    ends = torch.searchsorted(indices_TK.flatten().sort().values, ids, right=True)
    return torch.diff(ends, prepend=ends.new_zeros(1))


def as_rows(x: Tensor, parts: int) -> Tensor:
    """[T, parts * C] as [T * parts, C].

    It goes through [T, parts, C], as the compiler vectorizes loops over rows of C, but not those that divide an index by C.
    """
    return x.unflatten(1, (parts, -1)).flatten(0, 1)


def _gather(full_TD: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    tokens, sub_dims = slots_TN.shape
    return as_rows(full_TD, sub_dims).index_select(0, rows).unflatten(0, (tokens, -1)).flatten(1)


def _scatter(compact_TKC: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    tokens, sub_dims = slots_TN.shape
    active = rows.shape[0] // tokens
    compact = as_rows(compact_TKC, active)
    if torch.compiler.is_compiling():  # pointwise, so that it fuses with its neighbors
        pair = slots_TN.clamp(min=0) + torch.arange(tokens, device=rows.device).unsqueeze(1) * active
        full = compact.index_select(0, pair.view(-1)).view(tokens, sub_dims, -1)
        return torch.where(slots_TN.unsqueeze(-1) >= 0, full, 0).flatten(1)
    # Inactive sub-dimensions read an extra row of zeros
    pair = slots_TN + torch.arange(tokens, device=rows.device).unsqueeze(1) * active
    pair = torch.where(slots_TN >= 0, pair, tokens * active)
    padded = torch.cat([compact, compact.new_zeros(1, compact.shape[1])])
    return padded.index_select(0, pair.view(-1)).view(tokens, -1)


class _Move(torch.autograd.Function):
    """`_gather` or `_scatter`, each the other's transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, slots_TN: Tensor, to_compact: bool) -> Tensor:
        ctx.save_for_backward(rows, slots_TN)
        ctx.to_compact = to_compact
        return (_gather if to_compact else _scatter)(x, rows, slots_TN)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (_scatter if ctx.to_compact else _gather)(grad, *ctx.saved_tensors), None, None, None


def gather_active(x_TD: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    """Every token's active sub-dimensions, slot by slot: [T, D] -> [T, K*C]. `rows`, `slots_TN`: see `Selection`."""
    if not torch.is_grad_enabled():  # saves decoding the cost of autograd's bookkeeping
        return _gather(x_TD, rows, slots_TN)
    return _Move.apply(x_TD, rows, slots_TN, True)


def scatter_active(z_TKC: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    """The transpose of `gather_active`: slots to their sub-dimensions, 0 elsewhere. [T, K*C] -> [T, D]."""
    return _Move.apply(z_TKC, rows, slots_TN, False)
