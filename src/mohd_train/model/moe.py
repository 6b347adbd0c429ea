"""A mixture-of-experts feed-forward layer: the baseline that MoHD is compared with, on the same router and kernels.

Where MoHD splits the hidden size, a mixture of experts splits the SwiGLU's intermediate size: expert i is a slice of it.
For every token S shared experts are active and a router picks K - S of the N - S others:

    y = sum_i w_i E_i(x),    E_i(x) = W_down[:, i] (silu(W_gate[i] x) * W_up[i] x)

with w = 1 for a shared expert and the scaled softmax over the others for a chosen one. Token-choice and dropless: every
token gets the experts that it chose, without capacity limits or padding. Attention and the residual stream are LLaMA's.

Shape letters: as in :mod:`mohd_train.model.mohd`, with N experts, K active per token, S shared, and P = K - S chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.kernels import ops
from mohd_train.model.mohd import ForwardContext, Router, Routing, is_plain


class Experts(nn.Module):
    """The router of a mixture of experts, and the layer's products with the weights of the base model's SwiGLU.

    Takes and returns what :class:`~mohd_train.model.mohd.SubDimensions` does. A chosen expert's weight is its score, a softmax
    over the N - S that the router chooses from, times the ``scaling``'s alpha: by default the P weights sum to P.

    Args:
        plan: N, K, S and the width F / K of an expert.
        model: the plan of the model that it is part of.
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``.
        component: the component's number in the model, for random routing.
    """

    def __init__(self, plan: SubDimPlan, model: ModelPlan, kernels: str = "auto", component: int = 0) -> None:
        super().__init__()
        self.plan = plan
        self.kernels = kernels
        self.reads_residual = model.router_input == "residual"
        choice = SubDimPlan(plan.sub_dims - plan.shared, plan.top_k - plan.shared, 0, plan.width)
        self.router = Router(choice, model, component)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        up: Sequence[nn.Linear],
        inner: Callable[..., Tensor],
        down: nn.Linear,
        context: ForwardContext,
        normed: Any = None,
    ) -> tuple[Tensor, Routing]:
        """``residual + y`` [T, D], and the routing.

        Args:
            x_TD: the normalized tokens.
            up: gate and up, [N * width, D] each; ``down`` is [D, N * width].
            inner: :func:`~mohd_train.model.mohd.swiglu`.
        """
        routing = self.route(residual_TD if self.reads_residual else x_TD, context)
        if all(is_plain(linear) for linear in (*up, down)):
            backend = ops.resolve_backend(
                self.kernels, x_TD.device, x_TD.dtype, width=self.plan.width, choices=self.plan.choices
            )
            selection = ops.make_selection(
                routing.indices, sub_dims=self.plan.sub_dims, shared=self.plan.shared, backend=backend
            )
            gate, up_proj = (linear.weight for linear in up)
            y_TD = ops.expert_ffn(x_TD, gate, up_proj, down.weight, selection, routing.weights, backend=backend)
        else:  # adapters and the like are called, at the cost of all experts
            h_TNE = inner(*(linear(x_TD) for linear in up)).unflatten(1, (self.plan.sub_dims, -1))
            gates_TN = torch.zeros_like(routing.scores).scatter(1, routing.indices, routing.weights)
            y_TD = down((h_TNE * gates_TN.unsqueeze(-1)).to(h_TNE.dtype).flatten(1))
        return (residual_TD + y_TD).to(residual_TD.dtype), routing

    def route(self, x_TD: Tensor, context: ForwardContext) -> Routing:
        """The experts of T tokens and their weights. In ``scores`` [T, N] a shared expert, which has none, counts 1."""
        chosen = self.router.route(x_TD, context)
        shared_TS = torch.arange(self.plan.shared, device=x_TD.device).expand(len(x_TD), -1)
        ones_TS = chosen.scores.new_ones(shared_TS.shape)
        return Routing(
            torch.cat([shared_TS, chosen.indices + self.plan.shared], dim=1),
            torch.cat([ones_TS, chosen.scores], dim=1),
            torch.cat([ones_TS, chosen.weights], dim=1),
            chosen.balance_loss,
        )
