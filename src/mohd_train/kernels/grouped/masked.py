"""The products of the `masked` path: over the full width, with zeros at what is not active.

For many narrow sub-dimensions, where a GEMM for each of them would be thousands of small ones: N / K times the arithmetic in a few
large ones, and nothing is sorted or read back by the host.

Shapes: T tokens, D hidden, N sub-dimensions, K active, C = D / N, O and F widths. Compact tensors are [T, K*C].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.kernels.reference import cast
from mohd_train.kernels.slots import gather_active, scatter_active


def up(x_TKC: Tensor, weight_OD: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    """``W x~`` [T, O] from the compact active inputs."""
    return F.linear(scatter_active(x_TKC, rows, slots_TN), weight_OD)


def down(h_TF: Tensor, weight_DF: Tensor, rows: Tensor, slots_TN: Tensor) -> Tensor:
    """The active slices of ``W h``, compact."""
    return gather_active(F.linear(h_TF, weight_DF), rows, slots_TN)


def fuse_residual(z_TKC: Tensor, mixing_NNC: Tensor, rows: Tensor, slots_TN: Tensor, residual_TD: Tensor) -> Tensor:
    """``residual + y'``, y'_{i,j} = sum_k mixing[idx_k, i, j] z_{k,j}: one product of [T, N] and [N, N] for each of the C places.
    [T, D] in the residual's dtype."""
    with torch.autocast(z_TKC.device.type, enabled=False):
        z = z_TKC.to(torch.promote_types(z_TKC.dtype, mixing_NNC.dtype))
        z_CTN = scatter_active(z, rows, slots_TN).unflatten(1, (slots_TN.shape[1], -1)).permute(2, 0, 1)
        y_TNC = torch.bmm(z_CTN, mixing_NNC.to(z.dtype).permute(2, 0, 1)).permute(1, 2, 0)
        return cast(residual_TD + y_TNC.flatten(1), residual_TD.dtype)
