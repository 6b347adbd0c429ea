"""Scores, slots and counts of a choice of sub-dimensions [T, K], none of them by a scatter.

In deterministic mode CUDA turns `scatter`, `scatter_add`, `index_put`, `index_add`, `index_copy` and the gradient of `gather` into
sorts that also wait for the host. Comparing indices costs less where there are few, and fuses with what stands beside it under
torch.compile; a binary search serves where there are many.

Shapes: T tokens, N sub-dimensions, K chosen ones a token. Rows of indices ascend and hold no index twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_COMPARED = 256  # K * N up to which every index is compared with every sub-dimension


def slots_of(indices_TK: Tensor, sub_dims: int) -> Tensor:
    """int64 [T, N]: the slot k that holds a sub-dimension, -1 where it was not chosen."""
    (tokens, active), device = indices_TK.shape, indices_TK.device
    ids = torch.arange(sub_dims, device=device)
    if active == 0:
        return torch.full((tokens, sub_dims), -1, dtype=torch.int64, device=device)
    if active * sub_dims <= MOST_COMPARED:
        places = torch.arange(1, active + 1, device=device)
        return ((indices_TK.unsqueeze(2) == ids) * places.unsqueeze(1)).sum(1) - 1
    wanted = ids.expand(tokens, sub_dims).contiguous()
    slots = torch.searchsorted(indices_TK.contiguous(), wanted).clamp(max=active - 1)
    return torch.where(indices_TK.gather(1, slots) == wanted, slots, -1)


class _Take(torch.autograd.Function):
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


def take_slots(scores_TN: Tensor, indices_TK: Tensor) -> Tensor:
    """``scores.gather(1, indices)`` [T, K], K > 0, whose gradient is a read through `slots_of` instead of a scatter."""
    if not torch.is_grad_enabled():
        return scores_TN.gather(1, indices_TK)
    return _Take.apply(scores_TN, indices_TK)


def count_selected(indices_TK: Tensor, sub_dims: int, token_mask_T: Tensor | None = None) -> Tensor:
    """How many tokens chose each sub-dimension: int64 [N]. Tokens where `token_mask_T` (bool [T]) is False don't count."""
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
