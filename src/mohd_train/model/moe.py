"""A mixture-of-experts feed-forward layer: the baseline that MoHD is compared with, on the same router and kernels.

Where MoHD splits the hidden size, a mixture of experts splits the SwiGLU's intermediate size: expert i is a slice of it.
For every token S shared experts are active and a router picks K - S of the N - S others:

    y = sum_i w_i E_i(x),    E_i(x) = W_down[:, i] (silu(W_gate[i] x) * W_up[i] x)

with w = 1 for a shared expert and the scaled softmax over the others for a chosen one. Token-choice and dropless: every
token gets the experts that it chose, with no capacity and no padding. Attention and the residual stream are LLaMA's.

Shape letters: as in :mod:`mohd_train.model.mohd`; N experts, K active ones a token, S shared ones, M = N - S and P = K - S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.kernels import ops
from mohd_train.model.mohd import ForwardContext, Router, Routing, activation_weights, balance_loss, is_plain
from mohd_train.model.random_routing import random_ranks


class Experts(nn.Module):
    """The router of a mixture of experts, and the layer's products with the weights of the base model's SwiGLU.

    Takes and returns what :class:`~mohd_train.model.mohd.SubDimensions` does. A chosen expert's weight is its score, a softmax
    over the N - S that the router chooses from, times the ``scaling``'s alpha: by default the P weights sum to P.

    Args:
        plan: N, K, S and the width F / K of an expert.
        model: the whole model's plan.
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``.
        component: the component's number in the model, for random routing.
    """

    def __init__(self, plan: SubDimPlan, model: ModelPlan, kernels: str = "auto", component: int = 0) -> None:
        super().__init__()
        self.plan = plan
        self.readings = model
        self.kernels = kernels
        self.component = component
        choice = SubDimPlan(plan.sub_dims - plan.shared, plan.top_k - plan.shared, 0, plan.width)
        self.router = Router(choice, model.hidden_size)

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
        routing = self.route(residual_TD if self.readings.router_input == "residual" else x_TD, context)
        if all(is_plain(linear) for linear in (*up, down)):
            backend = ops.resolve_backend(
                self.kernels, x_TD.device, x_TD.dtype, width=self.plan.width, choices=self.plan.choices
            )
            selection = ops.make_selection(
                routing.indices, sub_dims=self.plan.sub_dims, shared=self.plan.shared, backend=backend
            )
            gate, up_proj = up
            y_TD = ops.expert_ffn(
                x_TD, gate.weight, up_proj.weight, down.weight, selection, routing.weights, backend=backend
            )
        else:  # adapters and the like are called as modules, at the cost of all experts
            h_TNE = inner(*(linear(x_TD) for linear in up)).unflatten(1, (self.plan.sub_dims, -1))
            gates_TN = torch.zeros_like(routing.scores).scatter(1, routing.indices, routing.weights)
            y_TD = down((h_TNE * gates_TN.unsqueeze(-1)).to(h_TNE.dtype).flatten(1))
        return (residual_TD + y_TD).to(residual_TD.dtype), routing

    def route(self, x_TD: Tensor, context: ForwardContext) -> Routing:
        """The experts of T tokens and their weights. In ``scores`` [T, N] a shared expert, which has none, counts 1."""
        readings, choice, ranks = self.readings, self.router.plan, None
        if readings.routing == "random":
            assert context.token_keys_T is not None, "random routing goes by the tokens' keys"
            ranks = random_ranks(context.token_keys_T, choice.sub_dims, self.component)
        logits_TM, scores_TM, chosen_TP = self.router(x_TD, ranks)
        loss = balance_loss(
            logits_TM,
            chosen_TP,
            choice,
            readings.balance_loss_weight if context.balance and ranks is None else 0.0,
            context.token_mask_T,
            count=readings.balance_count,
        )
        shared_TS = torch.arange(self.plan.shared, device=x_TD.device).expand(len(x_TD), -1)
        ones_TS = scores_TM.new_ones(shared_TS.shape)
        return Routing(
            torch.cat([shared_TS, chosen_TP + self.plan.shared], dim=1),
            torch.cat([ones_TS, scores_TM], dim=1),
            torch.cat([ones_TS, activation_weights(scores_TM, chosen_TP, readings.scaling)], dim=1),
            loss,
        )
