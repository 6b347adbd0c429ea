"""Activation scaling: the weights of the active sub-dimensions, so that the flow through a component keeps its size."""

from __future__ import annotations

from torch import Tensor


def activation_weights(scores_TN: Tensor, indices_TK: Tensor, scaling: str) -> Tensor:
    """``alpha * g_i`` of every active sub-dimension, ``g_i = s_i`` there.

    ``sum_preserving``: ``alpha = K / sum_j g_j`` per token: the K weights sum to K, as K weights of 1 would.
    ``subdims``: ``alpha = N``: weight 1 under a uniform router. ``none``: ``alpha = 1``.

    Args:
        scores_TN: [T, N] softmax scores.
        indices_TK: int64 [T, K] active sub-dimensions.
        scaling: one of the names above.

    Returns:
        [T, K], in the scores' dtype; gradients reach the scores through alpha too.
    """
    active_TK = scores_TN.gather(1, indices_TK)
    if scaling == "sum_preserving":
        return active_TK * (indices_TK.shape[1] / active_TK.sum(dim=-1, keepdim=True))
    if scaling == "subdims":
        return active_TK * scores_TN.shape[1]
    assert scaling == "none", scaling
    return active_TK
