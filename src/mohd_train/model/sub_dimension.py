"""One component's sub-dimensions: route once, then the same active set for its input and its output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.kernels import ops
from mohd_train.model.activation_scaling import activation_weights
from mohd_train.model.balance_loss import balance_loss
from mohd_train.model.group_fusion import GroupFusion
from mohd_train.model.random_routing import random_ranks
from mohd_train.model.router import Router, Routing


class Normed(NamedTuple):
    """What the norm before a component hands on beside the normalized x.

    Attributes:
        logits_TN: of the router, float32 or wider.
        source: what x was normalized from.
    """

    logits_TN: Tensor
    source: ops.Source


class SubDimensions(nn.Module):
    """Router, activation scaling and group fusion of one component ("synchronized sparsification").

    Args:
        plan: the component's N, K, S.
        model: the whole model's plan.
        kernels: as for the transformer.
        component: the component's number in the model: 2 * layer, and one more for the FFN.
    """

    def __init__(self, plan: SubDimPlan, model: ModelPlan, kernels: str = "auto", component: int = 0) -> None:
        super().__init__()
        self.plan = plan
        self.kernels = kernels
        self.scaling = model.scaling
        self.gate_input = model.gate_input
        self.random = model.routing == "random"
        self.component = component
        # A random choice is not the router's: nothing for the balance loss to teach it
        self.balance_loss_weight = 0.0 if self.random else model.balance_loss_weight
        self.router = Router(plan, model.hidden_size)
        self.fusion = GroupFusion(plan, model.fusion)

    def normalize(self, x_TD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Normed]:
        """The component's RMSNorm and its router's logits together: the backward pass then needs no normalized x."""
        normed, logits, rstd = ops.norm_router(x_TD, gain_D, self.router.centroids, eps, backend=self.backend(x_TD))
        return normed, Normed(logits, ops.Source(x_TD, rstd, gain_D))

    def route(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None,
        token_keys_T: Tensor | None = None,
        norm: Normed | None = None,
        balance: bool = True,
    ) -> tuple[Routing, ops.Selection]:
        """Routes T normalized tokens; the router reads the full x.

        Args:
            token_keys_T: what random routing goes by.
            norm: what :meth:`normalize` gave beside ``x_TD``; None where x was normalized otherwise.
            balance: whether the balance loss is wanted.
        """
        ranks = None
        if self.random:
            assert token_keys_T is not None, "random routing needs the tokens' keys"
            ranks = random_ranks(token_keys_T, self.plan.sub_dims, self.component)
        logits, scores, indices = self.router(x_TD, ranks, None if norm is None else norm.logits_TN)
        weights = activation_weights(scores, indices, self.scaling)
        beta = self.balance_loss_weight if balance else 0.0
        loss = balance_loss(logits, indices, self.plan, beta, token_mask_T)
        selection = ops.make_selection(
            indices, sub_dims=self.plan.sub_dims, shared=self.plan.shared, backend=self.backend(x_TD)
        )
        return Routing(indices, scores, weights, loss), selection

    def input_weights(self, routing: Routing) -> Tensor | None:
        """``g`` of the active inputs [T, K] where the input is gated; by default it is not."""
        return routing.scores.gather(1, routing.indices) if self.gate_input else None

    def backend(self, x: Tensor) -> str:
        """The kernels that run for ``x``."""
        return ops.resolve_backend(self.kernels, x.device, x.dtype, width=self.plan.width)

    def fuse_residual(self, z_TKC: Tensor, selection: ops.Selection, residual_TD: Tensor) -> Tensor:
        """Group fusion and residual (eqs. 9, 17) from the compact output."""
        return ops.fuse_residual(z_TKC, self.fusion.blocks, selection, residual_TD, backend=self.backend(residual_TD))
