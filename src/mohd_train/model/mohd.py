"""MoHD: a transformer component that works on some sub-dimensions of the hidden state (Section 4 of arXiv:2412.05644).

The hidden state of width D is split into N sub-dimensions. For every token S shared ones are always active, and a router
chooses K - S of the N - S specialized ones. :class:`SubDimensions` runs a component (attention or feed-forward) on the
active ones; this file follows it from top to bottom:

    route              which sub-dimensions, and what each weighs           Router, select          eqs. 6-7, 11-12
    read               W x~, where x~ is x on the active sub-dimensions     ops.up_projection       eqs. 3-5
    inner              attention or SwiGLU, with all heads and inner dims   model/llama.py
    write              the active slices of W h                             ops.down_projection     eq. 8
    scale              z = alpha g y                                        activation_weights
    fuse               y' = B z, back to all D dims                         GroupFusion             eq. 9
    residual           x + y'                                               ops.fuse_residual       eq. 17

:func:`balance_loss` (eq. 13) keeps the router from always choosing the same ones. Where the paper is silent or
contradicts itself, the interpretation is a config key; docs/mohd.md lists them with the reasons for the defaults. The
sparse products are in :mod:`mohd_train.kernels`: `kernels/reference.py` is their mathematics, `kernels/ops.py` chooses
what runs.

Shape letters: T tokens (batch and sequence flattened), D hidden size, N sub-dimensions, K active per token, S shared,
C = D / N the width of one, F width between the projections (attention width or intermediate size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.kernels import ops
from mohd_train.model.random_routing import random_ranks


class ForwardContext(NamedTuple):
    """What all layers share in one forward pass.

    Attributes:
        rope: cosine and sine [B, 1, T, head_dim] of the positions.
        mask: bool [B or 1, 1, T, S], True where a query may look; None: plain causal attention.
        token_mask_T: bool [B*T], False for padding; None: no padding.
        token_keys_T: int64 [B*T], the keys of random routing; None for a learned router.
        cache: key/value cache with ``update(k, v, layer)``; None while training.
        balance: whether to compute the balance loss.
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None = None
    token_mask_T: Tensor | None = None
    token_keys_T: Tensor | None = None
    cache: Any = None
    balance: bool = True


class Routing(NamedTuple):
    """What one component's router decided for T tokens.

    Attributes:
        indices: int64 [T, K], active sub-dimensions, ascending: columns 0 .. S-1 hold 0 .. S-1, the rest the chosen ones.
        scores: [T, N] ``s = softmax(E x)`` over all N, float32 (float64 for float64 input).
        weights: [T, K] ``alpha * g`` of the active ones, in the scores' dtype.
        balance_loss: scalar, already multiplied by its weight (eq. 13); 0 where it was not requested.
    """

    indices: Tensor
    scores: Tensor
    weights: Tensor
    balance_loss: Tensor


class Normed(NamedTuple):
    """What the RMSNorm before a component computes along with the normalized x.

    Attributes:
        logits_TN: the router's logits, float32 or wider.
        inputs: what x was normalized from, so that the backward pass can recompute it; None: x is kept.
    """

    logits_TN: Tensor
    inputs: ops.NormInputs | None


class SubDimensions(nn.Module):
    """One component on its sub-dimensions: the router and the group fusion around the base model's projections.

    Args:
        plan: the component's N, K, S.
        model: the plan of the model that it is part of.
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``.
        component: the component's number in the model: 2 * layer for attention, 2 * layer + 1 for the FFN.
    """

    def __init__(self, plan: SubDimPlan, model: ModelPlan, kernels: str = "auto", component: int = 0) -> None:
        super().__init__()
        self.plan = plan
        self.model_plan = model
        self.kernels = kernels
        self.router = Router(plan, model, component)
        self.fusion = GroupFusion(plan, model.fusion)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        up: Sequence[nn.Linear],
        inner: Callable[..., Tensor],
        down: nn.Linear,
        context: ForwardContext,
        normed: Normed | None = None,
    ) -> tuple[Tensor, Routing]:
        """``residual + y'`` [T, D], and the routing.

        Args:
            x_TD: the normalized tokens; ``normed`` is what :meth:`normalize` computed along with them.
            up: the projections that read the hidden dims, [F, D] each: q, k, v or gate, up.
            inner: from their outputs [T, F] to the input of ``down`` [D, F]; :func:`swiglu` runs fused with the products.
        """
        routing, selection = self.route(x_TD, context, normed)
        gates_TK = self.input_weights(routing)
        blocks_CNN, within_NCC = self.fusion()
        backend = self.backend(x_TD)
        if all(is_plain(linear) for linear in (*up, down)):
            weights, down_DF = [linear.weight for linear in up], fold(within_NCC, down.weight)
            norm_inputs = None if normed is None else normed.inputs
            if inner is swiglu:
                gate_FD, up_FD = weights
                z_TKC = ops.swiglu_ffn(
                    x_TD, gate_FD, up_FD, down_DF, selection, routing.weights,
                    input_weights_TK=gates_TK, norm_inputs=norm_inputs, backend=backend,
                )  # fmt: skip
            else:
                read = ops.up_projection(
                    x_TD, weights, selection, input_weights_TK=gates_TK, norm_inputs=norm_inputs, backend=backend
                )
                z_TKC = ops.down_projection(inner(*read), down_DF, selection, routing.weights, backend=backend)
        else:
            z_TKC = self.through_modules(x_TD, up, inner, down, routing, gates_TK, within_NCC)
        return ops.fuse_residual(z_TKC, blocks_CNN, selection, residual_TD, backend=backend), routing

    def route(
        self, x_TD: Tensor, context: ForwardContext | None = None, normed: Normed | None = None
    ) -> tuple[Routing, ops.Selection]:
        """The routing of T tokens, and the one selection that serves the component's input and its output
        ("synchronized sparsification")."""
        routing = self.router.route(x_TD, context, None if normed is None else normed.logits_TN)
        selection = ops.make_selection(
            routing.indices, sub_dims=self.plan.sub_dims, shared=self.plan.shared, backend=self.backend(x_TD)
        )
        return routing, selection

    def input_weights(self, routing: Routing) -> Tensor | None:
        """``g`` of the active inputs [T, K] where the input is gated (``gate_input``); by default it is not."""
        return ops.gather_scores(routing.scores, routing.indices) if self.model_plan.gate_input else None

    def backend(self, x: Tensor) -> str:
        """The kernels that run for ``x``."""
        return ops.resolve_backend(self.kernels, x.device, x.dtype, width=self.plan.width, choices=self.plan.choices)

    def normalize(self, x_TD: Tensor, norm_weight_D: Tensor, eps: float) -> tuple[Tensor, Normed]:
        """RMSNorm and the router's logits together: the backward pass then needs no normalized x."""
        if self.model_plan.router_input == "residual":
            return F.rms_norm(x_TD, norm_weight_D.shape, norm_weight_D, eps), Normed(self.router.logits(x_TD), None)
        n_TD, logits_TN, rstd_T = ops.norm_router(
            x_TD, norm_weight_D, self.router.centroids, eps, backend=self.backend(x_TD)
        )
        return n_TD, Normed(logits_TN, ops.NormInputs(x_TD, rstd_T, norm_weight_D))

    def through_modules(
        self,
        x_TD: Tensor,
        up: Sequence[nn.Linear],
        inner: Callable[..., Tensor],
        down: nn.Linear,
        routing: Routing,
        gates_TK: Tensor | None,
        within_NCC: Tensor | None,
    ) -> Tensor:
        """z [T, K*C] for projections that have to be called (see :func:`is_plain`): over the full width, with zeros at
        the inactive dims of their input."""
        tokens, n, c = x_TD.shape[0], self.plan.sub_dims, self.plan.width
        ones_TK = torch.ones_like(routing.weights) if gates_TK is None else gates_TK
        gates_TN = x_TD.new_zeros(tokens, n, dtype=ones_TK.dtype).scatter(1, routing.indices, ones_TK)
        active_TD = (x_TD.view(tokens, n, c) * gates_TN.unsqueeze(-1)).flatten(1).to(x_TD.dtype)
        y_TNC = down(inner(*(linear(active_TD) for linear in up))).view(tokens, n, c)
        if within_NCC is not None:
            y_TNC = torch.einsum("nij,tnj->tni", within_NCC.to(y_TNC.dtype), y_TNC)
        y_TKC = y_TNC.gather(1, routing.indices.unsqueeze(-1).expand(-1, -1, c))
        return (y_TKC * routing.weights.unsqueeze(-1)).to(y_TKC.dtype).flatten(1)


class Router(nn.Module):
    """Centroids ``E in R^{N x D}``, one router per layer and component: logits ``E x``, scores ``s = softmax(E x)``.

    Logits and softmax never run in bfloat16: 0.4% of the choices would flip and 0.6% would tie.

    Args:
        plan: N, K, S of what it chooses from.
        model: the plan of the model that it is part of.
        component: the component's number in the model, for random routing.
    """

    def __init__(self, plan: SubDimPlan, model: ModelPlan, component: int) -> None:
        super().__init__()
        self.plan = plan
        self.model_plan = model
        self.component = component
        self.centroids = nn.Parameter(torch.empty(plan.sub_dims, model.hidden_size))

    def logits(self, x_TD: Tensor) -> Tensor:
        """``E x`` [T, N] in float32 or wider, under autocast too."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            return x_TD.to(dtype) @ self.centroids.to(dtype).T

    def forward(
        self, x_TD: Tensor, ranks_TN: Tensor | None = None, logits_TN: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and scores [T, N] in float32 or wider, and the active indices [T, K] (eqs. 6-7, 11-12).

        Args:
            x_TD: [T, D] tokens.
            ranks_TN: [T, N] what to choose by instead of the logits (random routing); the scores still weigh the choice.
            logits_TN: [T, N] ``E x``, where the norm has computed it already.
        """
        logits_TN = self.logits(x_TD) if logits_TN is None else logits_TN
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            scores_TN = logits_TN.softmax(dim=-1)
        ranks_TN = logits_TN if ranks_TN is None else ranks_TN
        return logits_TN, scores_TN, select(ranks_TN, self.plan.top_k, self.plan.shared)

    def route(self, x_TD: Tensor, context: ForwardContext | None = None, logits_TN: Tensor | None = None) -> Routing:
        """The choice for T tokens with its weights and its balance loss. Without a context there is no balance loss."""
        model, ranks_TN, mask_T = self.model_plan, None, None
        balance_weight = 0.0
        if context is not None:
            mask_T = context.token_mask_T
            balance_weight = model.balance_loss_weight if context.balance else 0.0
        if model.routing == "random":
            assert context is not None
            assert context.token_keys_T is not None, "random routing needs the tokens' keys"
            ranks_TN = random_ranks(context.token_keys_T, self.plan.sub_dims, self.component)
            balance_weight = 0.0  # the choice is not the router's, so there is nothing to teach it
        logits_TN, scores_TN, indices_TK = self(x_TD, ranks_TN, logits_TN)
        weights_TK = activation_weights(scores_TN, indices_TK, model.scaling)
        loss = balance_loss(
            logits_TN, indices_TK, self.plan, balance_weight, mask_T,
            count=model.balance_count, scores=model.balance_scores,
        )  # fmt: skip
        return Routing(indices_TK, scores_TN, weights_TK, loss)


def select(scores_TN: Tensor, top_k: int, shared: int) -> Tensor:
    """The active sub-dimensions of every token: the shared ones, and the ``top_k - shared`` best of the others (eqs. 6-7,
    11-12).

    Ties go to the lower index, on every device: argmax for one, a stable sort for several (``torch.topk`` breaks ties
    differently).

    Args:
        scores_TN: [T, N] scores or logits.
        top_k: K, shared ones included.
        shared: S.

    Returns:
        int64 [T, K], ascending in each row.
    """
    tokens, sub_dims = scores_TN.shape
    always = torch.arange(shared, device=scores_TN.device).expand(tokens, shared)
    chosen = top_k - shared
    if chosen == 0:
        return always.contiguous()
    if top_k == sub_dims:
        return torch.arange(sub_dims, device=scores_TN.device).expand(tokens, sub_dims).contiguous()
    candidates = scores_TN.detach()[:, shared:]
    if chosen == 1:
        best = candidates.argmax(dim=-1, keepdim=True)
    else:
        best = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :chosen].sort(dim=-1).values
    return torch.cat([always, best + shared], dim=-1)


def activation_weights(scores_TN: Tensor, indices_TK: Tensor, scaling: str) -> Tensor:
    """Activation scaling: the weights ``alpha * g_i`` of the active sub-dimensions, where ``g_i = s_i``.

    The paper asks for "a scaling factor to ensure that the sum of activation weights across all dimensions remains
    consistent with the input". ``scaling`` is how that is read:

    - ``sum_to_active``: ``alpha = K / sum_j g_j``, the K weights sum to K, as K weights of 1 would;
    - ``sum_to_all``: ``alpha = N / sum_j g_j``, they sum to N, as the N weights of 1 of the input do;
    - ``subdims``: ``alpha = N``, weight 1 under a uniform router;
    - ``gate_mass``: ``alpha = N * sum_j g_j``;
    - ``none``: ``alpha = 1``, Table 4's "w.o. Sub-Dimension Scaling".

    Args:
        scores_TN: [T, N] softmax scores.
        indices_TK: int64 [T, K] active sub-dimensions.

    Returns:
        [T, K], in the scores' dtype. Gradients reach the scores through alpha too.
    """
    g_TK = ops.gather_scores(scores_TN, indices_TK)
    if scaling == "none":
        return g_TK
    n, k, mass_T1 = scores_TN.shape[1], indices_TK.shape[1], g_TK.sum(dim=-1, keepdim=True)
    alpha = {"sum_to_active": k / mass_T1, "sum_to_all": n / mass_T1, "subdims": n, "gate_mass": n * mass_T1}[scaling]
    return g_TK * alpha


class GroupFusion(nn.Module):
    """Group fusion (eq. 9): a Monarch-structured map that carries the active sub-dimensions back to all D dims.

    ``y'_{i,j} = sum_k B_j[i, k] z_{k,j}``: the dims at place j of each sub-dimension form group j. That is a
    block-diagonal matrix of C blocks N x N between two stride permutations. With ``monarch`` a second factor of N
    blocks C x C comes first, within the sub-dimensions: ``z_k <- C_k z_k``. It is folded into the down-projection's
    weight (``C (alpha g W h) = alpha g (C W) h``), so it costs no pass over the tokens. Both start as the identity.

    Parameters:
        mixing: [N (from k), N (to i), C (place j)], ``B_j[i, k] = mixing[k, i, j]``: the layout whose slices by source
            sub-dimension are contiguous. None for ``fusion: none``.
        within: [N, C, C], ``within[k] = C_k``; only for ``monarch``.
    """

    def __init__(self, plan: SubDimPlan, fusion: str) -> None:
        super().__init__()
        n, c = plan.sub_dims, plan.width
        self.mixing = nn.Parameter(torch.empty(n, n, c)) if fusion in ("grouped", "monarch") else None
        self.within = nn.Parameter(torch.empty(n, c, c)) if fusion == "monarch" else None

    @property
    def blocks(self) -> Tensor | None:
        """``B`` [C, N, N] as a view: ``blocks[j, i, k] = B_j[i, k]``."""
        return None if self.mixing is None else self.mixing.permute(2, 1, 0)

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """``blocks`` and ``within``: by a call, so that hooks run (an offloaded parameter is loaded by one)."""
        return self.blocks, self.within


def fold(within_NCC: Tensor | None, down_DF: Tensor) -> Tensor:
    """The down-projection's weight [D, F] multiplied by the fusion's ``within`` factor, if it has one."""
    if within_NCC is None:
        return down_DF
    n, c, _ = within_NCC.shape
    return torch.bmm(within_NCC, down_DF.view(n, c, -1)).view_as(down_DF)


def balance_loss(
    logits_TN: Tensor,
    indices_TK: Tensor,
    plan: SubDimPlan,
    weight: float,
    token_mask_T: Tensor | None = None,
    *,
    count: str = "selected",
    scores: str = "specialized",
) -> Tensor:
    """``beta * sum_i f_i * P_i`` over the specialized sub-dimensions of one component (eq. 13); 0 where there is
    nothing to choose.

    ``f_i = (N-S) / ((K-S) T) * #{t: i selected}``; with ``count="highest"`` ``(N-S) / T * #{t: i scores highest}``, the
    paper's words, which differ only where more than one is chosen. ``P_i = mean_t p_{i,t}``; ``p`` is the score
    normalized over the specialized ones, a softmax of their logits; with ``scores="all"`` the softmax over all N.
    Perfect balance gives ``beta`` (with ``all`` less: beta times the mass on specialized ones).

    Args:
        logits_TN: [T, N] router logits.
        indices_TK: int64 [T, K] active sub-dimensions.
        plan: the component's N, K, S.
        weight: beta.
        token_mask_T: bool [T], False for padding, which counts in neither f nor P.

    Returns:
        Scalar in the logits' dtype.
    """
    if not plan.has_choice or weight == 0:
        return logits_TN.new_zeros(())
    specialized_TM = logits_TN[:, plan.shared :]
    p_TM = specialized_TM.softmax(dim=-1) if scores == "specialized" else logits_TN.softmax(dim=-1)[:, plan.shared :]
    chosen_TP = indices_TK[:, plan.shared :] - plan.shared
    if count == "highest":
        chosen_TP = specialized_TM.detach().argmax(dim=-1, keepdim=True)
    selections_M = ops.count_selected(chosen_TP, p_TM.shape[1], token_mask_T).to(p_TM.dtype)
    if token_mask_T is None:
        mean_p_M, share_M = p_TM.mean(dim=0), selections_M / max(p_TM.shape[0], 1)
    else:
        tokens = token_mask_T.sum().clamp(min=1)
        mean_p_M, share_M = (p_TM * token_mask_T[:, None]).sum(dim=0) / tokens, selections_M / tokens
    f_M = share_M * (plan.sub_dims - plan.shared) / chosen_TP.shape[1]
    return weight * (f_M * mean_p_M).sum()


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate_TF) * up_TF


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module's weights can be read instead of calling it.

    Not those of an adapter (LoRA), of a quantized or parametrized layer, of one with a bias or with hooks (offloading uses
    them): such a module is called, at the cost of the full width.
    """
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    hooked = any(len(found) for found in hooks) or "forward" in module.__dict__
    return type(module) is kind and not hooked and getattr(module, "bias", None) is None
