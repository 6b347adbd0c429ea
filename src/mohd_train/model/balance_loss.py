"""The balance loss (eq. 13), over the specialized sub-dimensions of one component."""

from __future__ import annotations

import torch
from torch import Tensor

from mohd_train.config.plan import SubDimPlan


def balance_loss(
    logits_TN: Tensor, indices_TK: Tensor, plan: SubDimPlan, weight: float, token_mask_T: Tensor | None = None
) -> Tensor:
    """``beta * sum_i f_i * P_i`` with ``f_i = (N-S) / ((K-S) T) * #{t: i selected}`` and ``P_i = mean_t p_{i,t}``.

    ``p`` is the score normalized over the specialized ones (softmax of their logits: the same number, and finite even
    where the shared ones take all of the mass). Perfect balance gives ``beta``. 0 where there is nothing to choose.

    Args:
        logits_TN: [T, N] router logits.
        indices_TK: int64 [T, K] active sub-dimensions.
        plan: the component's N, K, S.
        weight: beta.
        token_mask_T: bool [T], False for padding, which counts in neither f nor P.

    Returns:
        Scalar in the logits' dtype.
    """
    if not plan.has_choice or weight == 0:
        return logits_TN.new_zeros(())
    probabilities = logits_TN[:, plan.shared :].softmax(dim=-1)  # [T, N - S]
    chosen = indices_TK[:, plan.shared :] - plan.shared  # [T, K - S]
    counted = torch.ones_like(logits_TN[:, 0]) if token_mask_T is None else token_mask_T.to(logits_TN.dtype)
    tokens = counted.sum().clamp(min=1)
    selections = torch.zeros_like(probabilities).scatter_add(1, chosen, counted[:, None].expand_as(chosen)).sum(dim=0)
    f = selections * (plan.sub_dims - plan.shared) / (plan.specialized * tokens)
    mean_probability = (probabilities * counted[:, None]).sum(dim=0) / tokens
    return weight * (f * mean_probability).sum()
