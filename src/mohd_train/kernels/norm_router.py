"""RMSNorm and the router's logits of one component (eqs. 6-7), and the active inputs recomputed in the backward pass.

Only x, which the residual stream keeps anyway, and ``1 / rms(x)`` are saved for the backward pass. It recomputes the normalized x,
and its active sub-dimensions where the products need them, from those two.

Shapes: T tokens, D hidden, N sub-dimensions, K active per token, C = D / N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels import reference
from mohd_train.kernels.fusion import blocks
from mohd_train.kernels.slots import as_rows


class NormInputs(NamedTuple):
    """What a normalized input is recomputed from: ``n = x * rstd * norm_weight``."""

    x_TD: Tensor
    rstd_T: Tensor  # 1 / rms(x), in float32 or wider
    norm_weight_D: Tensor


class _NormRouter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, norm_weight_D: Tensor, centroids_ND: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_TD, logits_TN, rstd_T = reference.norm_router(x_TD, norm_weight_D, centroids_ND, eps)
        ctx.save_for_backward(x_TD, norm_weight_D, centroids_ND, rstd_T)
        ctx.mark_non_differentiable(rstd_T)
        return n_TD, logits_TN, rstd_T

    @staticmethod
    def backward(
        ctx: Any, grad_normed: Tensor, grad_logits: Tensor, unused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, norm_weight_D, centroids_ND, rstd_T = ctx.saved_tensors
        rstd, dtype = rstd_T.unsqueeze(-1), rstd_T.dtype
        unit, norm_weight = x_TD.to(dtype) * rstd, norm_weight_D.to(dtype)
        # torch.compile traces this in the forward pass's autocast region, where eager autograd runs it outside of it
        with torch.autocast(x_TD.device.type, enabled=False):
            grad = grad_normed.to(dtype) + grad_logits @ centroids_ND.to(dtype)
            grad_centroids = grad_logits.t() @ unit * norm_weight
        grad_weight = (grad * unit).sum(0)
        grad = grad * norm_weight
        grad_x = rstd * (grad - unit * (grad * unit).mean(-1, keepdim=True))
        return grad_x.to(x_TD.dtype), grad_weight.to(norm_weight_D.dtype), grad_centroids.to(centroids_ND.dtype), None


def norm_router(x_TD: Tensor, norm_weight_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_router`, with a backward pass that recomputes the normalized x."""
    if not torch.is_grad_enabled():  # saves decoding the cost of autograd's bookkeeping
        return reference.norm_router(x_TD, norm_weight_D, centroids_ND, eps)
    return _NormRouter.apply(x_TD, norm_weight_D, centroids_ND, eps)


def recompute_active(norm_inputs: NormInputs, rows: Tensor, sub_dims: int, dtype: torch.dtype) -> Tensor:
    """The normalized x on the active sub-dimensions, [T, K, C]: computed and rounded to x's dtype as in the norm, then cast to
    `dtype`. It works in blocks of rows, like the fusion.

    `rows` int64 [T*K]: token * N + sub-dimension, in the order wanted.
    """
    x_rows, norm_weight_NC = _as_rows(norm_inputs, sub_dims)
    out = x_rows.new_empty(rows.shape[0], x_rows.shape[1])
    for start, stop in blocks(rows.shape[0], out.shape[1], out.device):
        out[start:stop] = _recompute_rows(x_rows, norm_inputs.rstd_T, norm_weight_NC, rows[start:stop])
    return out.to(dtype).unflatten(0, (norm_inputs.x_TD.shape[0], -1))


def recompute_active_traced(norm_inputs: NormInputs, rows: Tensor, sub_dims: int, dtype: torch.dtype) -> Tensor:
    """As `recompute_active`, for torch.compile, which turns it into one loop."""
    x_rows, norm_weight_NC = _as_rows(norm_inputs, sub_dims)
    active = _recompute_rows(x_rows, norm_inputs.rstd_T, norm_weight_NC, rows).to(x_rows.dtype)
    return active.to(dtype).unflatten(0, (norm_inputs.x_TD.shape[0], -1))


def _as_rows(norm_inputs: NormInputs, sub_dims: int) -> tuple[Tensor, Tensor]:
    norm_weight = norm_inputs.norm_weight_D.to(norm_inputs.rstd_T.dtype)
    return as_rows(norm_inputs.x_TD, sub_dims), norm_weight.view(sub_dims, -1)


def _recompute_rows(x_rows: Tensor, rstd_T: Tensor, norm_weight_NC: Tensor, rows: Tensor) -> Tensor:
    tokens = rows // norm_weight_NC.shape[0]
    scaled = x_rows.index_select(0, rows).to(rstd_T.dtype) * rstd_T.index_select(0, tokens).unsqueeze(1)
    return scaled * norm_weight_NC.index_select(0, rows - tokens * norm_weight_NC.shape[0])
