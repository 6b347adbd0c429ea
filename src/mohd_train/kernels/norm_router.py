"""RMSNorm and the router's logits of one component in torch (eqs. 6-7): what `triton_norm` fuses.

Kept for the backward pass: x, which the residual stream keeps anyway, and ``1 / rms(x)``. The normalized x is had back from them.
Shapes: T tokens, D hidden, N sub-dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reference(x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``n = x / rms(x) * gain`` [T, D] in x's dtype, ``E n`` [T, N] in float32 or wider, from n before it is rounded, and
    ``1 / rms(x)`` [T] without a gradient."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        x = x_TD.to(dtype)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = x * rstd * gain_D.to(dtype)
        return normed.to(x_TD.dtype), normed @ centroids_ND.to(dtype).t(), rstd.detach().squeeze(-1)


class _NormRouter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x = x_TD.to(dtype)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = x * rstd * gain_D.to(dtype)
        kept = rstd.squeeze(-1)
        ctx.save_for_backward(x_TD, gain_D, centroids_ND, kept)
        ctx.mark_non_differentiable(kept)
        return normed.to(x_TD.dtype), normed @ centroids_ND.to(dtype).t(), kept

    @staticmethod
    def backward(
        ctx: Any, grad_normed: Tensor, grad_logits: Tensor, unused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, gain_D, centroids_ND, kept = ctx.saved_tensors
        rstd, dtype = kept.unsqueeze(-1), kept.dtype
        unit, gain = x_TD.to(dtype) * rstd, gain_D.to(dtype)
        grad = grad_normed.to(dtype) + grad_logits @ centroids_ND.to(dtype)
        grad_centroids = grad_logits.t() @ unit * gain
        grad_gain = (grad * unit).sum(0)
        grad = grad * gain
        grad_x = rstd * (grad - unit * (grad * unit).mean(-1, keepdim=True))
        return grad_x.to(x_TD.dtype), grad_gain.to(gain_D.dtype), grad_centroids.to(centroids_ND.dtype), None


def norm_router(x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, with a backward pass of its own."""
    if not torch.is_grad_enabled():  # spares decoding the cost of autograd's bookkeeping
        return reference(x_TD, gain_D, centroids_ND, eps)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _NormRouter.apply(x_TD, gain_D, centroids_ND, eps)
