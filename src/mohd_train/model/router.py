"""The router: which specialized sub-dimensions a token uses, and how much each active one weighs (eqs. 6-7, 11-12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mohd_train.config.plan import SubDimPlan


class Routing(NamedTuple):
    """What the router of one component decided for T tokens.

    Attributes:
        indices: int64 [T, K], active sub-dimensions: columns 0 .. S-1 hold 0 .. S-1, the rest the chosen ones, ascending.
        scores: [T, N] ``s = softmax(E x)`` over all N, float32 (float64 for float64 input).
        weights: [T, K] ``alpha * g`` of the active ones, in the scores' dtype.
        balance_loss: scalar, already multiplied by its weight (eq. 13); 0 where it was not asked for.
    """

    indices: Tensor
    scores: Tensor
    weights: Tensor
    balance_loss: Tensor


def select(scores_TN: Tensor, top_k: int, shared: int) -> Tensor:
    """Active sub-dimensions of every token: the shared ones and the ``top_k - shared`` best of the others.

    The same rule everywhere, ties to the lower index: argmax for one, a stable sort for several (``torch.topk``
    breaks ties otherwise).

    Args:
        scores_TN: [T, N] scores or logits.
        top_k: K, shared ones included.
        shared: S.

    Returns:
        int64 [T, K], ascending in each row.
    """
    tokens, sub_dims = scores_TN.shape
    always = torch.arange(shared, device=scores_TN.device).expand(tokens, shared)
    chosen = top_k - shared
    if chosen == 0:
        return always.contiguous()
    if top_k == sub_dims:
        return torch.arange(sub_dims, device=scores_TN.device).expand(tokens, sub_dims).contiguous()
    candidates = scores_TN.detach()[:, shared:]
    if chosen == 1:
        best = candidates.argmax(dim=-1, keepdim=True)
    else:
        best = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :chosen].sort(dim=-1).values
    return torch.cat([always, best + shared], dim=-1)


class Router(nn.Module):
    """Centroids ``E in R^{N x d}``, one router per layer and component. Logits and softmax never run in bfloat16:
    there 0.4% of the choices flip and 0.6% tie."""

    def __init__(self, plan: SubDimPlan, hidden_size: int) -> None:
        super().__init__()
        self.plan = plan
        self.centroids = nn.Parameter(torch.empty(plan.sub_dims, hidden_size))

    def forward(
        self, x_TD: Tensor, ranks_TN: Tensor | None = None, logits_TN: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``E x`` and scores ``s`` [T, N] in float32 or wider, and the active indices [T, K].

        Args:
            x_TD: [T, d] normalized tokens.
            ranks_TN: [T, N] what the choice goes by in place of the logits (random routing); the scores still weigh it.
            logits_TN: [T, N] ``E x``, where the norm has worked it out already.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            if logits_TN is None:
                logits_TN = x_TD.to(dtype) @ self.centroids.to(dtype).T
            scores_TN = logits_TN.softmax(dim=-1)
        ranks_TN = logits_TN if ranks_TN is None else ranks_TN
        return logits_TN, scores_TN, select(ranks_TN, self.plan.top_k, self.plan.shared)
