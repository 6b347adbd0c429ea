"""The products of the `masked` path: over the full width, with zeros at what is not active.

It is for selections whose active slices would take many small products: N / K times the arithmetic in as many products as a dense
layer has, and nothing is sorted or copied to the host.

Shapes: T tokens, D hidden, N sub-dimensions, K active, C = D / N, O and F widths. Compact tensors are [T, K*C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.kernels.reference import cast, product_dtype
from mohd_train.kernels.selection import Selection
from mohd_train.kernels.slots import gather_active, scatter_active


def up(
    x_TD: Tensor, weights_OD: Sequence[Tensor], s: Selection, input_weights_TK: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``W x~``: [T, O_i] each."""
    active_TD = _times(x_TD, s, input_weights_TK)
    active_TD = active_TD.to(product_dtype(active_TD))  # once, not for each weight
    return tuple(F.linear(active_TD, weight) for weight in weights_OD)


def down(h_TF: Tensor, weight_DF: Tensor, s: Selection) -> Tensor:
    """The active slices of ``W h``, compact."""
    return gather_active(F.linear(h_TF, weight_DF), s.rows, s.slots_TN)


def expert_ffn(
    x_TD: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, s: Selection, weights_TK: Tensor
) -> Tensor:
    """The weighted sum of a token's experts [T, D], from the hidden values of all experts."""
    hidden_TF = F.silu(F.linear(x_TD, w_gate_FD)) * F.linear(x_TD, w_up_FD)
    return F.linear(_times(hidden_TF, s, weights_TK), w_down_DF)


def fuse_residual(z_TKC: Tensor, mixing_NNC: Tensor, s: Selection, residual_TD: Tensor) -> Tensor:
    """``residual + y'``, y'_{i,j} = sum_k mixing[idx_k, i, j] z_{k,j}: one product of [T, N] and [N, N] for each of the C places.
    [T, D] in the residual's dtype."""
    out: Tensor = _Fuse.apply(z_TKC, mixing_NNC, residual_TD, s.rows, s.slots_TN)
    return out


class _Fuse(torch.autograd.Function):
    """Saves the compact z for the backward pass instead of the full width."""

    @staticmethod
    def forward(
        ctx: Any, z_TKC: Tensor, mixing_NNC: Tensor, residual_TD: Tensor, rows: Tensor, slots_TN: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z_TKC, mixing_NNC, rows, slots_TN)
        with torch.autocast(z_TKC.device.type, enabled=False):
            z_CTN, mixing = _by_place(z_TKC, mixing_NNC, rows, slots_TN)
            y_TNC = torch.bmm(z_CTN, mixing.permute(2, 0, 1)).permute(1, 2, 0)
            return cast(residual_TD + y_TNC.flatten(1), residual_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        z_TKC, mixing_NNC, rows, slots_TN = ctx.saved_tensors
        with torch.autocast(grad_TD.device.type, enabled=False):
            z_CTN, mixing = _by_place(z_TKC, mixing_NNC, rows, slots_TN)
            grad_CTN = grad_TD.to(z_CTN.dtype).unflatten(1, (slots_TN.shape[1], -1)).permute(2, 0, 1)
            grad_z_TNC = torch.bmm(grad_CTN, mixing.permute(2, 1, 0)).permute(1, 2, 0)
            grad_mixing_CNN = torch.bmm(z_CTN.transpose(1, 2), grad_CTN)
        grad_z = gather_active(grad_z_TNC.flatten(1), rows, slots_TN).to(z_TKC.dtype)
        return grad_z, grad_mixing_CNN.permute(1, 2, 0).to(mixing_NNC.dtype), grad_TD, None, None


def _by_place(z_TKC: Tensor, mixing_NNC: Tensor, rows: Tensor, slots_TN: Tensor) -> tuple[Tensor, Tensor]:
    """z over the full width, [C, T, N], and the mixing, in the wider dtype of both."""
    dtype = torch.promote_types(z_TKC.dtype, mixing_NNC.dtype)
    z_TNC = scatter_active(z_TKC.to(dtype), rows, slots_TN).unflatten(1, (slots_TN.shape[1], -1))
    return z_TNC.permute(2, 0, 1), mixing_NNC.to(dtype)


def _times(full: Tensor, s: Selection, weights_TK: Tensor | None) -> Tensor:
    """Each of the N slices of `full` times its weight, multiplied in the wider dtype; 0 where it is not active."""
    slices = full.unflatten(1, (s.sub_dims, -1))
    if weights_TK is None:
        return torch.where((s.slots_TN >= 0).unsqueeze(-1), slices, 0).flatten(1)
    weights_TN = scatter_active(weights_TK, s.rows, s.slots_TN)
    return (slices * weights_TN.unsqueeze(-1)).to(full.dtype).flatten(1)
