"""MoHD's sparse execution in an exported folder's code: the plain mathematics, under the names of kernels.ops.

The reference's masks work on any device and in any float dtype. The project's own kernels are several times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.kernels import reference


class ops:  # stands in for a module
    """What :mod:`mohd_train.model.mohd` calls."""

    class Selection(NamedTuple):
        """The active sub-dimensions [T, K] of every token, of N."""

        indices_TK: Tensor
        sub_dims: int

    class NormInputs(NamedTuple):
        """What a normalized x was computed from; not needed here."""

        x_TD: Tensor
        rstd_T: Tensor
        norm_weight_D: Tensor

    @staticmethod
    def resolve_backend(
        name: str, device: Any, dtype: Any, *, width: int | None = None, choices: int | None = None
    ) -> str:
        """There is one."""
        return "reference"

    @staticmethod
    def make_selection(indices_TK: Tensor, *, sub_dims: int, shared: int, backend: str) -> ops.Selection:
        """The choice, unchanged."""
        return ops.Selection(indices_TK, sub_dims)

    @staticmethod
    def norm_router(
        x_TD: Tensor, norm_weight_D: Tensor, centroids_ND: Tensor, eps: float, *, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """RMSNorm, and the router's logits (eqs. 6-7)."""
        return reference.norm_router(x_TD, norm_weight_D, centroids_ND, eps)

    @staticmethod
    def up_projection(
        x_TD: Tensor,
        weights: Sequence[Tensor],
        selection: ops.Selection,
        *,
        input_weights_TK: Tensor | None = None,
        norm_inputs: Any = None,
        backend: str,
    ) -> tuple[Tensor, ...]:
        """``W x~`` (eqs. 3-5)."""
        return reference.up_projection(x_TD, weights, selection.indices_TK, selection.sub_dims, input_weights_TK)

    @staticmethod
    def down_projection(
        h_TF: Tensor, weight_DF: Tensor, selection: ops.Selection, weights_TK: Tensor, *, backend: str
    ) -> Tensor:
        """The active slices of ``W h``, scaled (eq. 8)."""
        return reference.down_projection(h_TF, weight_DF, selection.indices_TK, selection.sub_dims, weights_TK)

    @staticmethod
    def swiglu_ffn(
        x_TD: Tensor,
        w_gate_FD: Tensor,
        w_up_FD: Tensor,
        w_down_DF: Tensor,
        selection: ops.Selection,
        weights_TK: Tensor,
        *,
        input_weights_TK: Tensor | None = None,
        norm_inputs: Any = None,
        backend: str,
    ) -> Tensor:
        """``down(silu(gate x~) * up x~)``."""
        gate_TF, up_TF = ops.up_projection(
            x_TD, (w_gate_FD, w_up_FD), selection, input_weights_TK=input_weights_TK, backend=backend
        )
        return ops.down_projection(F.silu(gate_TF) * up_TF, w_down_DF, selection, weights_TK, backend=backend)

    @staticmethod
    def expert_ffn(
        x_TD: Tensor,
        w_gate_FD: Tensor,
        w_up_FD: Tensor,
        w_down_DF: Tensor,
        selection: ops.Selection,
        weights_TK: Tensor,
        *,
        backend: str,
    ) -> Tensor:
        """The weighted sum of a token's experts."""
        sizes = (selection.indices_TK, selection.sub_dims, weights_TK)
        return reference.expert_ffn(x_TD, w_gate_FD, w_up_FD, w_down_DF, *sizes)

    @staticmethod
    def fuse_residual(
        z_TKC: Tensor, mixing_CNN: Tensor | None, selection: ops.Selection, residual_TD: Tensor, *, backend: str
    ) -> Tensor:
        """``residual + y'`` (eqs. 9, 17)."""
        return reference.fuse_residual(z_TKC, mixing_CNN, selection.indices_TK, selection.sub_dims, residual_TD)

    @staticmethod
    def gather_scores(scores_TN: Tensor, indices_TK: Tensor) -> Tensor:
        """The active ones' scores [T, K]."""
        return scores_TN.gather(1, indices_TK)

    @staticmethod
    def count_selected(indices_TK: Tensor, sub_dims: int, token_mask_T: Tensor | None = None) -> Tensor:
        """How many tokens chose each sub-dimension: int64 [N]."""
        chosen = F.one_hot(indices_TK, sub_dims)
        return (chosen if token_mask_T is None else chosen * token_mask_T[:, None, None]).sum((0, 1))


def linear_cross_entropy(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean next-token loss, in float32 or wider."""
    logits_TV = F.linear(hidden_TD, head_VD)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), labels_T, ignore_index=ignore_index)
