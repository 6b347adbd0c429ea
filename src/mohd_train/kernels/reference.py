"""The mathematics of a MoHD component (arXiv:2412.05644, eqs. 3-9, 17), with masks over the full width: slow, in any float dtype.

Every other backend is tested against this one, in outputs and gradients.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, F inner width, O an output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without a call where x has that dtype already.

    For what the forward pass of an `autograd.Function` returns: torch 2.11's compiler drops the gradient of an output that is a
    no-op of another tensor.
    """
    return x if x.dtype == dtype else x.to(dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed: autocast's where that is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def norm_router(x_TD: Tensor, norm_weight_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and the router's logits (eqs. 6-7).

    ``n = x / rms(x) * norm_weight`` [T, D] in the dtype of the products that read it; ``E n`` [T, N] in float32 or wider, from n
    before it is rounded; and ``1 / rms(x)`` [T] without a gradient.
    """
    dtype, out_dtype = torch.promote_types(x_TD.dtype, torch.float32), product_dtype(x_TD)
    with torch.autocast(x_TD.device.type, enabled=False):
        x = x_TD.to(dtype)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = x * rstd * norm_weight_D.to(dtype)
        return cast(normed, out_dtype), normed @ centroids_ND.to(dtype).t(), rstd.detach().squeeze(-1)


def up_projection(
    x_TD: Tensor, weights: Sequence[Tensor], indices_TK: Tensor, sub_dims: int, input_weights_TK: Tensor | None
) -> tuple[Tensor, ...]:
    """``W x~`` for every ``W`` [O, D]; x~ is x on the active sub-dimensions, 0 elsewhere (eqs. 3-5). [T, O] each."""
    gate_TN = x_TD.new_zeros(x_TD.shape[0], sub_dims)
    if input_weights_TK is None:
        gate_TN = gate_TN.scatter(1, indices_TK, 1.0)
    else:
        gate_TN = gate_TN.scatter(1, indices_TK, input_weights_TK.to(x_TD.dtype))
    sparse_TD = (x_TD.unflatten(1, (sub_dims, -1)) * gate_TN.unsqueeze(-1)).flatten(1)
    return tuple(F.linear(sparse_TD, weight) for weight in weights)


def down_projection(h_TF: Tensor, weight_DF: Tensor, indices_TK: Tensor, sub_dims: int, weights_TK: Tensor) -> Tensor:
    """The active slices of ``W h`` times their routing weights (eq. 8, activation scaling). Compact: [T, K*C]."""
    y_TNC = F.linear(h_TF, weight_DF).unflatten(1, (sub_dims, -1))
    y_TKC = y_TNC.gather(1, indices_TK.unsqueeze(-1).expand(-1, -1, y_TNC.shape[-1]))
    return (y_TKC * weights_TK.unsqueeze(-1)).to(y_TKC.dtype).flatten(1)


def expert_ffn(
    x_TD: Tensor,
    w_gate_FD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    indices_TK: Tensor,
    experts: int,
    weights_TK: Tensor,
) -> Tensor:
    """The weighted sum of a token's experts, equal slices of F: ``W_down (w * silu(W_gate x) * W_up x)`` [T, D], where w is 0 for
    those that are not active."""
    h_TNE = (F.silu(F.linear(x_TD, w_gate_FD)) * F.linear(x_TD, w_up_FD)).unflatten(1, (experts, -1))
    gates_TN = weights_TK.new_zeros(x_TD.shape[0], experts).scatter(1, indices_TK, weights_TK)
    return F.linear((h_TNE * gates_TN.unsqueeze(-1)).to(h_TNE.dtype).flatten(1), w_down_DF)


def fuse_residual(
    z_TKC: Tensor, mixing_CNN: Tensor | None, indices_TK: Tensor, sub_dims: int, residual_TD: Tensor
) -> Tensor:
    """``residual + y'``, y'_{i,j} = sum_k B_j[i, idx_k] z_{k,j} (eqs. 9, 17). Without mixing, each slice of z is added to its own
    sub-dimension."""
    tokens, active = indices_TK.shape
    z_TKC = z_TKC.view(tokens, active, -1)
    if mixing_CNN is not None:
        z_TKC = z_TKC.to(torch.promote_types(z_TKC.dtype, mixing_CNN.dtype))
    index = indices_TK.unsqueeze(-1).expand_as(z_TKC)
    y_TNC = z_TKC.new_zeros(tokens, sub_dims, z_TKC.shape[-1]).scatter(1, index, z_TKC)
    if mixing_CNN is not None:
        with torch.autocast(z_TKC.device.type, enabled=False):
            y_TNC = torch.einsum("jin,tnj->tij", mixing_CNN.to(y_TNC.dtype), y_TNC)
    return (residual_TD + y_TNC.flatten(1)).to(residual_TD.dtype)
