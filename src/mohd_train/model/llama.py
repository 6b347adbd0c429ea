"""The transformer: LLaMA, with MoHD components (:mod:`mohd_train.model.mohd`) where the plan has them.

Single-device code, without parallelism, config files or loggers.

Shape letters: B batch, T positions, S positions with the cached ones, H heads, E head_dim, A = H*E attention width, D
hidden size, F intermediate size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mohd_train.config.plan import ModelPlan
from mohd_train.kernels.loss import linear_cross_entropy
from mohd_train.kernels.reference import product_dtype
from mohd_train.model.init import initialize
from mohd_train.model.moe import Experts
from mohd_train.model.mohd import ForwardContext, Normed, Router, Routing, SubDimensions, is_plain, swiglu
from mohd_train.model.random_routing import token_keys

IGNORE_INDEX = -100


class LayerRouting(NamedTuple):
    """Routing of one layer; None for a dense component."""

    attention: Routing | None
    ffn: Routing | None


@dataclass
class TransformerOutput:
    """What a forward pass returns.

    Attributes:
        hidden: [B, T, D] after the final norm.
        balance_loss: scalar float32, over layers and components as ``balance_reduction`` says; 0 for a dense model.
        logits: [B, T, V], or None where they were not asked for.
        cross_entropy: mean over the predicted tokens in float32, where labels were given.
        routing: one entry a layer.
        hidden_states: where they were asked for, L + 1 of [B, T, D]: the embeddings, then each block's output, of which the
            last one is after the final norm.
    """

    hidden: Tensor
    balance_loss: Tensor
    logits: Tensor | None = None
    cross_entropy: Tensor | None = None
    routing: list[LayerRouting] = field(default_factory=list)
    hidden_states: tuple[Tensor, ...] = ()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full D, computed in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """``x / rms(x) * weight``, for any leading shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(position_ids_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, T, E] of LLaMA's rotary embeddings, in float32 (float64 for a float64 model)."""
    work = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids_BT.device).to(work)
    inverse_frequency = 1.0 / (theta ** (steps / head_dim))
    angles = position_ids_BT[:, None, :, None].to(work) * inverse_frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [B, H, T, E] with rotary embeddings applied, in their own dtype."""
    cos, sin = table
    first, second = x_BHTE.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BHTE * cos + rotated * sin).to(x_BHTE.dtype)


def attention_mask(padding_BS: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Bool mask [B or 1, 1, T, S], True where a query may look; None where none is needed: plain causal attention (T = S),
    or a single query.

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
    """``h = x + attn(norm(x))`` without the norm: takes the normalized x and the residual, returns the sum.

    All heads stay dense; a MoHD layer reads and writes only the active sub-dimensions.
    """

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
        """The projections that read the hidden dims."""
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, x_BTD: Tensor, residual_BTD: Tensor, context: ForwardContext, normed: Normed | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The new residual stream [B, T, D], and the routing (None for a dense layer)."""
        batch, queries, _ = x_BTD.shape

        def attend(*qkv: Tensor) -> Tensor:
            """From q, k and v to what ``o_proj`` reads: [B, T, A], or [B*T, A] from flattened ones."""
            q, k, v = (part.view(batch, queries, -1, self.plan.head_dim).transpose(1, 2) for part in qkv)
            y_BHTE = self._attend(q, k, v, context)
            return y_BHTE.transpose(1, 2).reshape(qkv[0].shape)

        if self.sub_dimensions is None:
            x_BTD = x_BTD.to(product_dtype(x_BTD))  # once, not for each weight
            return residual_BTD + self.o_proj(attend(*(linear(x_BTD) for linear in self.up_projections))), None
        stream_TD, routing = self.sub_dimensions(
            x_BTD.flatten(0, 1), residual_BTD.flatten(0, 1), self.up_projections, attend, self.o_proj, context, normed
        )
        return stream_TD.view_as(residual_BTD), routing

    def _attend(self, q_BHTE: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        q, k = rotate(q_BHTE, context.rope), rotate(k, context.rope)
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.mask,
            is_causal=context.mask is None and q.shape[2] == k.shape[2],
            enable_gqa=self.plan.num_key_value_heads != self.plan.num_attention_heads,
        )


class FeedForward(nn.Module):
    """SwiGLU: ``x' = h + ffn(norm(h))`` without the norm, as :class:`Attention`.

    All F intermediate dims stay dense in a MoHD layer; in a mixture of experts all hidden dims do.
    """

    def __init__(self, plan: ModelPlan, layer: int, kernels: str = "auto") -> None:
        super().__init__()
        d, f = plan.hidden_size, plan.ffn_width
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.sub_dimensions = SubDimensions(plan.ffn, plan, kernels, 2 * layer + 1) if plan.ffn else None
        self.experts = Experts(plan.experts, plan, kernels, 2 * layer + 1) if plan.experts else None

    @property
    def up_projections(self) -> tuple[nn.Linear, ...]:
        """The projections that read the hidden dims."""
        return self.gate_proj, self.up_proj

    def forward(
        self, x_BTD: Tensor, residual_BTD: Tensor, context: ForwardContext, normed: Normed | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The new residual stream [B, T, D], and the routing (None for a dense layer)."""
        routed = self.experts if self.sub_dimensions is None else self.sub_dimensions
        if routed is None:
            x_BTD = x_BTD.to(product_dtype(x_BTD))
            return residual_BTD + self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD))), None
        stream_TD, routing = routed(
            x_BTD.flatten(0, 1),
            residual_BTD.flatten(0, 1),
            self.up_projections,
            swiglu,
            self.down_proj,
            context,
            normed,
        )
        return stream_TD.view_as(residual_BTD), routing


class Block(nn.Module):
    """``h = x + attn(norm1(x))``, ``x' = h + ffn(norm2(h))``."""

    def __init__(self, plan: ModelPlan, layer: int, kernels: str = "auto") -> None:
        super().__init__()
        self.attention_norm = RMSNorm(plan.hidden_size, plan.rms_norm_eps)
        self.attention = Attention(plan, layer, kernels)
        self.ffn_norm = RMSNorm(plan.hidden_size, plan.rms_norm_eps)
        self.ffn = FeedForward(plan, layer, kernels)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> tuple[Tensor, LayerRouting]:
        """The residual stream [B, T, D] after the block, and the block's routing."""
        n, normed = _normalize(x_BTD, self.attention_norm, self.attention.sub_dimensions)
        h, attention_routing = self.attention(n, x_BTD, context, normed)
        n, normed = _normalize(h, self.ffn_norm, self.ffn.sub_dimensions)
        x, ffn_routing = self.ffn(n, h, context, normed)
        return x, LayerRouting(attention_routing, ffn_routing)


def _normalize(x_BTD: Tensor, norm: RMSNorm, sub: SubDimensions | None) -> tuple[Tensor, Normed | None]:
    """The normalized x, and for a MoHD component what the norm computed along with it."""
    if sub is None:
        return norm(x_BTD), None
    if not (is_plain(norm, RMSNorm) and is_plain(sub.router, Router)):
        n_BTD = norm(x_BTD)
        read_BTD = x_BTD if sub.model_plan.router_input == "residual" else n_BTD
        return n_BTD, Normed(sub.router(read_BTD.flatten(0, 1))[0], None)
    n_TD, normed = sub.normalize(x_BTD.flatten(0, 1), norm.weight, norm.eps)
    return n_TD.view_as(x_BTD), normed


class Transformer(nn.Module):
    """Token embedding, L blocks, final norm and an untied head; only the blocks' MoHD components are not dense over D.

    Args:
        plan: what to build (:func:`mohd_train.config.plan.make_plan`).
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``: what runs the sparse layers.
        seed: of the initial weights; None draws one from torch's global generator. A model built under
            ``torch.device("meta")`` has no weights until :func:`mohd_train.model.init.initializer`'s function fills them.
    """

    def __init__(self, plan: ModelPlan, kernels: str = "auto", seed: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(plan.vocab_size, plan.hidden_size)
        self.blocks = nn.ModuleList(Block(plan, layer, kernels) for layer in range(plan.num_hidden_layers))
        self.norm = RMSNorm(plan.hidden_size, plan.rms_norm_eps)
        self.head = nn.Linear(plan.hidden_size, plan.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            initialize(self, plan, seed)

    def forward(
        self,
        input_ids_BT: Tensor | None,
        attention_mask_BS: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        labels_BT: Tensor | None = None,
        logits: bool = True,
        balance: bool | None = None,
        *,
        embeddings_BTD: Tensor | None = None,
        mask: Tensor | None = None,
        built_mask: bool = False,
        hidden_states: bool = False,
    ) -> TransformerOutput:
        """The hidden states, the balance loss and the routing, and what else is asked for.

        Args:
            input_ids_BT: int64 [B, T] tokens.
            attention_mask_BS: [B, S] non-zero for real tokens, over the cached positions too; None: no padding.
            position_ids: int64 [B or 1, T]; default: those that follow what the cache holds.
            cache: key/value cache with ``get_seq_length()`` and ``update(k, v, layer)``, as transformers' DynamicCache.
            labels_BT: int64 [B, T], the input's tokens where they count in the loss, -100 elsewhere; the label at position t
                is predicted from position t - 1.
            logits: whether to return the logits.
            balance: whether to compute the balance loss, which is 0 otherwise; default: if there is no cache.
            embeddings_BTD: [B, T, D] instead of the tokens' own embeddings.
            mask: with ``built_mask``, the mask that attention uses instead of one built from ``attention_mask_BS``: [B, 1, T, S],
                bool (True where a query may look) or added to the scores. None: plain causal attention.
            hidden_states: whether to return them.
        """
        balance = cache is None if balance is None else balance
        past = cache.get_seq_length() if cache is not None else 0
        if embeddings_BTD is None:
            assert input_ids_BT is not None, "tokens or their embeddings"
            embeddings_BTD = self.embedding(input_ids_BT)
        x, queries, device = embeddings_BTD, embeddings_BTD.shape[1], embeddings_BTD.device
        if position_ids is None:
            position_ids = torch.arange(past, past + queries, device=device)[None]
        keys = None
        if self.plan.routing == "random":
            if input_ids_BT is None:
                raise ValueError("random routing depends on the tokens: give input_ids, not embeddings alone")
            keys = token_keys(input_ids_BT, position_ids)
        context = ForwardContext(
            rope=rotary_table(position_ids, self.plan.head_dim, self.plan.rope_theta, x.dtype),
            mask=mask if built_mask else attention_mask(attention_mask_BS, queries, past + queries, device),
            token_mask_T=None if attention_mask_BS is None else attention_mask_BS[:, -queries:].flatten() != 0,
            token_keys_T=keys,
            cache=cache,
            balance=balance,
        )
        routing: list[LayerRouting] = []
        states = [x] if hidden_states else []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x, layer_routing = checkpoint(block, x, context, use_reentrant=False)
            else:
                x, layer_routing = block(x, context)
            routing.append(layer_routing)
            if hidden_states:
                states.append(x)
        x = self.norm(x)
        out = TransformerOutput(
            hidden=x,
            balance_loss=self._balance_loss(routing if balance else [], x),
            routing=routing,
            hidden_states=(*states[:-1], x) if hidden_states else (),
        )
        if logits:
            out.logits = self.head(x)
        if labels_BT is not None:
            out.cross_entropy = self._cross_entropy(x, labels_BT)
        return out

    def _cross_entropy(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean next-token loss; position t of the labels is predicted from position t - 1."""
        # The labels are shifted, since shifted hidden states would be a copy
        targets = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
        if not is_plain(self.head):
            logits_TV = self.head(hidden_BTD).flatten(0, 1)
            wide = torch.promote_types(logits_TV.dtype, torch.float32)
            return F.cross_entropy(logits_TV.to(wide), targets.flatten(), ignore_index=IGNORE_INDEX)
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.head.weight, targets.flatten(), ignore_index=IGNORE_INDEX
        )

    def _balance_loss(self, routing: list[LayerRouting], like: Tensor) -> Tensor:
        """Eq. 18: the sum over layers and both components, or the mean over the routed components."""
        losses = [part.balance_loss for layer in routing for part in (layer.attention, layer.ffn) if part is not None]
        if not losses:
            return torch.zeros((), device=like.device, dtype=torch.float32)
        total = torch.stack(losses).sum()
        return total / len(losses) if self.plan.balance_reduction == "component_mean" else total

    @torch.no_grad()
    def lay_out_for_decoding(self) -> None:
        """Transposes the memory of the MoHD up-projections' weights, in place: shapes, names and values stay.

        A sub-dimension's slice is then one piece of memory instead of a piece of every row: on a CPU one token's x4
        projections take 1.1 instead of 1.5 times LLaMA's (docs/kernels.md). Only on a CPU; it was not measured elsewhere.
        """
        for block in self.blocks:
            for part in (block.attention, block.ffn):
                for linear in part.up_projections if part.sub_dimensions is not None else ():
                    weight = linear.weight
                    if weight.device.type == "cpu" and weight.is_contiguous():
                        weight.data = weight.data.t().contiguous().t()
