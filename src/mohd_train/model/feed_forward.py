"""SwiGLU feed-forward, dense or MoHD. All F intermediate dims stay dense."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan
from mohd_train.kernels import ops
from mohd_train.model.router import Routing
from mohd_train.model.sub_dimension import Normed, SubDimensions


class FeedForward(nn.Module):
    """``x' = h + MoHD_ffn(norm(h))`` without the norm: takes the normalized x and the residual, returns the sum."""

    def __init__(self, plan: ModelPlan, layer: int, kernels: str = "auto") -> None:
        super().__init__()
        d, f = plan.hidden_size, plan.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.sub_dimensions = SubDimensions(plan.ffn, plan, kernels, 2 * layer + 1) if plan.ffn else None

    @property
    def up_projections(self) -> tuple[nn.Linear, ...]:
        """What reads the hidden dims."""
        return self.gate_proj, self.up_proj

    def forward(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        token_mask_T: Tensor | None = None,
        token_keys_T: Tensor | None = None,
        norm: Normed | None = None,
        balance: bool = True,
    ) -> tuple[Tensor, Routing | None]:
        """Returns the new residual stream [B, T, D] and the routing (None for a dense layer).

        Args: as for :meth:`mohd_train.model.sub_dimension.SubDimensions.route`, from ``token_mask_T`` on.
        """
        if self.sub_dimensions is None:
            return residual_BTD + self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)), None
        x_TD = x_BTD.flatten(0, 1)
        sub = self.sub_dimensions
        routing, selection = sub.route(x_TD, token_mask_T, token_keys_T, norm, balance)
        source = None if norm is None else norm.source
        z = ops.swiglu_ffn(
            x_TD,
            self.gate_proj.weight,
            self.up_proj.weight,
            sub.fusion.fold(self.down_proj.weight),
            selection,
            routing.weights,
            input_weights_TK=sub.input_weights(routing),
            source=source,
            backend=sub.backend(x_TD),
        )  # eqs. 3-5, 8
        return sub.fuse_residual(z, selection, residual_BTD.flatten(0, 1)).view_as(residual_BTD), routing  # eqs. 9, 17
