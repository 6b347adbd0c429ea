"""Causal self-attention, dense or MoHD. All heads stay dense; a MoHD layer reads and writes only the active sub-dimensions.

Shapes: B batch, T positions, H heads, E head_dim, A = H*E attention width, D hidden, K active sub-dimensions, C their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan
from mohd_train.kernels import ops
from mohd_train.model.rope import rotate
from mohd_train.model.router import Routing
from mohd_train.model.sub_dimension import Normed, SubDimensions


def attention_mask(padding_BS: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Bool mask [B or 1, 1, T, S], True where a query may look; None where plain causality (T = S) or one query says it all.

    Args:
        padding_BS: [B, S] non-zero for real tokens, or None.
        queries: T, the last T of the S = ``keys`` positions.
    """
    if padding_BS is None and (queries == keys or queries == 1):
        return None
    position = torch.arange(keys, device=device)
    causal = position[None, :] <= position[keys - queries :, None]  # [T, S]
    if padding_BS is None:
        return causal[None, None]
    allowed = causal & (padding_BS[:, None, None, :] != 0)
    # A padding query sees itself alone, so that no row is empty and no NaN arises.
    return allowed | (position[None, :] == position[keys - queries :, None])


class Attention(nn.Module):
    """``h = x + MoHD_attn(norm(x))`` without the norm: takes the normalized x and the residual, returns the sum."""

    def __init__(self, plan: ModelPlan, layer: int, kernels: str = "auto") -> None:
        super().__init__()
        self.plan, self.layer = plan, layer
        d, a, kv = plan.hidden_size, plan.query_width, plan.key_value_width
        self.q_proj = nn.Linear(d, a, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(a, d, bias=False)
        self.sub_dimensions = SubDimensions(plan.attention, plan, kernels, 2 * layer) if plan.attention else None

    @property
    def up_projections(self) -> tuple[nn.Linear, ...]:
        """What reads the hidden dims."""
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        cache: Any = None,
        token_keys_T: Tensor | None = None,
        norm: Normed | None = None,
        balance: bool = True,
    ) -> tuple[Tensor, Routing | None]:
        """Returns the new residual stream [B, T, D] and the routing (None for a dense layer).

        Args: as for :meth:`mohd_train.model.sub_dimension.SubDimensions.route`, from ``token_mask_T`` on.
        """
        if self.sub_dimensions is None:
            q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
            return residual_BTD + self.o_proj(self._attend(q, k, v, rope, mask, cache)), None
        x_TD = x_BTD.flatten(0, 1)
        sub = self.sub_dimensions
        routing, selection = sub.route(x_TD, token_mask_T, token_keys_T, norm, balance)
        source = None if norm is None else norm.source
        backend = sub.backend(x_TD)
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        qkv = ops.up_projection(
            x_TD, weights, selection, input_weights_TK=sub.input_weights(routing), source=source, backend=backend
        )  # eqs. 3-5
        q, k, v = (part.view(*x_BTD.shape[:2], -1) for part in qkv)
        h_TA = self._attend(q, k, v, rope, mask, cache).flatten(0, 1)
        z = ops.down_projection(
            h_TA, sub.fusion.fold(self.o_proj.weight), selection, routing.weights, backend=backend
        )  # eq. 8
        return sub.fuse_residual(z, selection, residual_BTD.flatten(0, 1)).view_as(residual_BTD), routing  # eqs. 9, 17

    def _attend(
        self, q_BTA: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
    ) -> Tensor:
        batch, queries, _ = q_BTA.shape
        q, k, v = (part.view(batch, queries, -1, self.plan.head_dim).transpose(1, 2) for part in (q_BTA, k, v))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and queries == k.shape[2],
            enable_gqa=self.plan.num_key_value_heads != self.plan.num_attention_heads,
        )
        return y.transpose(1, 2).reshape(batch, queries, -1)
