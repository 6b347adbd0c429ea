"""The transformer: LLaMA, with MoHD components where the plan has them.

Single-device code: it knows no parallelism, config file or logger.

Shapes: B batch, T positions, D hidden size d, V vocabulary, N sub-dimensions, K active ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan
from mohd_train.kernels.loss import linear_cross_entropy
from mohd_train.model.attention import Attention, attention_mask
from mohd_train.model.feed_forward import FeedForward
from mohd_train.model.init import initialize
from mohd_train.model.random_routing import token_keys
from mohd_train.model.rope import rotary_table
from mohd_train.model.router import Routing
from mohd_train.model.sub_dimension import Normed, SubDimensions

IGNORE_INDEX = -100


class LayerRouting(NamedTuple):
    """Routing of one layer; None for a dense component."""

    attention: Routing | None
    ffn: Routing | None


@dataclass
class TransformerOutput:
    """What a forward pass gives.

    Attributes:
        hidden: [B, T, D] after the final norm.
        balance_loss: scalar float32, over layers and components as ``balance_reduction`` says; 0 for a dense model.
        logits: [B, T, V], or None where they were not asked for.
        cross_entropy: mean over the predicted tokens in float32, where labels were given.
        routing: one entry a layer.
    """

    hidden: Tensor
    balance_loss: Tensor
    logits: Tensor | None = None
    cross_entropy: Tensor | None = None
    routing: list[LayerRouting] = field(default_factory=list)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full d, worked out in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """``x / rms(x) * weight``, any leading shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    """``h = x + MoHD_attn(norm1(x))``, ``x' = h + MoHD_ffn(norm2(h))``."""

    def __init__(self, plan: ModelPlan, layer: int, kernels: str = "auto") -> None:
        super().__init__()
        self.attention_norm = RMSNorm(plan.hidden_size, plan.rms_norm_eps)
        self.attention = Attention(plan, layer, kernels)
        self.ffn_norm = RMSNorm(plan.hidden_size, plan.rms_norm_eps)
        self.ffn = FeedForward(plan, layer, kernels)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        token_mask_T: Tensor | None = None,
        cache: Any = None,
        token_keys_T: Tensor | None = None,
        balance: bool = True,
    ) -> tuple[Tensor, LayerRouting]:
        """Returns the residual stream [B, T, D] after the block, and the block's routing."""
        normed, norm = _normalize(x_BTD, self.attention_norm, self.attention.sub_dimensions)
        h, attention_routing = self.attention(
            normed, x_BTD, rope, mask, token_mask_T, cache, token_keys_T, norm, balance
        )
        normed, norm = _normalize(h, self.ffn_norm, self.ffn.sub_dimensions)
        x, ffn_routing = self.ffn(normed, h, token_mask_T, token_keys_T, norm, balance)
        return x, LayerRouting(attention_routing, ffn_routing)


def _normalize(x_BTD: Tensor, norm: RMSNorm, sub: SubDimensions | None) -> tuple[Tensor, Normed | None]:
    """The normalized x, and what a MoHD component wants beside it."""
    if sub is None:
        return norm(x_BTD), None
    normed_TD, rest = sub.normalize(x_BTD.flatten(0, 1), norm.weight, norm.eps)
    return normed_TD.view_as(x_BTD), rest


class Transformer(nn.Module):
    """Token embedding, L blocks, final norm and an untied head, all dense over d but the blocks' MoHD components.

    Args:
        plan: sizes and readings (:func:`mohd_train.config.plan.make_plan`).
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``: what runs the sparse layers.
        seed: where given, parameters are drawn from a generator of their own, so that the global one stays untouched.
    """

    def __init__(self, plan: ModelPlan, kernels: str = "auto", seed: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.embedding = nn.Embedding(plan.vocab_size, plan.hidden_size)
        self.blocks = nn.ModuleList(Block(plan, layer, kernels) for layer in range(plan.num_hidden_layers))
        self.norm = RMSNorm(plan.hidden_size, plan.rms_norm_eps)
        self.head = nn.Linear(plan.hidden_size, plan.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            initialize(self, plan, seed)

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BS: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        labels_BT: Tensor | None = None,
        logits: bool = True,
        balance: bool | None = None,
    ) -> TransformerOutput:
        """Runs the model.

        Args:
            input_ids_BT: int64 [B, T] tokens.
            attention_mask_BS: [B, S] non-zero for real tokens, over the cached positions too; None: no padding.
            position_ids: int64 [B or 1, T]; default: counted on from what the cache holds.
            cache: key/value cache with ``get_seq_length()`` and ``update(k, v, layer)``, as transformers' DynamicCache.
            labels_BT: int64 [B, T], equal to the input where it counts and -100 elsewhere; position t is predicted at t - 1.
            logits: whether to return the logits.
            balance: whether to work out the balance loss, 0 otherwise; default: unless there is a cache.
        """
        balance = cache is None if balance is None else balance
        past = cache.get_seq_length() if cache is not None else 0
        queries = input_ids_BT.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + queries, device=input_ids_BT.device)[None]
        mask = attention_mask(attention_mask_BS, queries, past + queries, input_ids_BT.device)
        token_mask = None if attention_mask_BS is None else attention_mask_BS[:, -queries:].flatten() != 0
        keys = token_keys(input_ids_BT, position_ids) if self.plan.routing == "random" else None
        x = self.embedding(input_ids_BT)
        rope = rotary_table(position_ids, self.plan.head_dim, self.plan.rope_theta, x.dtype)
        routing: list[LayerRouting] = []
        for block in self.blocks:
            x, layer_routing = block(x, rope, mask, token_mask, cache, keys, balance)
            routing.append(layer_routing)
        x = self.norm(x)
        out = TransformerOutput(
            hidden=x, balance_loss=self._balance_loss(routing if balance else [], x), routing=routing
        )
        if logits:
            out.logits = self.head(x)
        if labels_BT is not None:
            out.cross_entropy = self._cross_entropy(x, labels_BT)
        return out

    @torch.no_grad()
    def lay_out_for_decoding(self) -> None:
        """Lays the MoHD up-projections' weights out by input dim, in place: shapes, names and values stay.

        A sub-dimension's slice is then one piece of memory, where it was a piece of every row: on a CPU one token's x4
        projections take 1.1 instead of 1.5 times LLaMA's (docs/kernels.md). On other devices nothing is done: not measured.
        """
        for block in self.blocks:
            for part in (block.attention, block.ffn):
                for linear in part.up_projections if part.sub_dimensions is not None else ():
                    weight = linear.weight
                    if weight.device.type == "cpu" and weight.is_contiguous():
                        weight.data = weight.data.t().contiguous().t()

    def _cross_entropy(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean next-token loss; position t of the labels is predicted from position t - 1."""
        targets = F.pad(
            labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX
        )  # shifting these spares a copy of the hidden states
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
