"""Routing by domain (Fig. 11): the mean router probability of each sub-dimension, and how often it is chosen.

Shapes: T tokens, N sub-dimensions, K active, S shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohd_train.analysis.architecture import COMPONENTS
from mohd_train.analysis.corpus import Corpus, open_corpus
from mohd_train.analysis.subject import Subject, load_subject
from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.errors import UserError
from mohd_train.model.llama import LayerRouting, Transformer

FIGURE_TOKENS = 4096  # of each domain: "mean over 4096 tokens"


@dataclass(frozen=True)
class RouterSelection:
    """One component of one layer, by domain. Each list has one number per sub-dimension, shared ones first.

    Attributes:
        probability: mean of the softmax over all N; sums to 1.
        specialized_probability: mean of the score normalized over the N - S specialized ones (as in the balance loss), None
            for shared ones; sums to 1. The paper's Fig. 11 shows 0.2 to 0.3, which agrees with this definition (1/5 for five).
        selected: share of the tokens for which the sub-dimension is active; sums to K.
        tokens: number of tokens read from each domain.
    """

    layer: int
    component: str
    shared: int
    probability: dict[str, list[float]]
    specialized_probability: dict[str, list[float | None]]
    selected: dict[str, list[float]]
    tokens: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class RoutingTally:
    """Sums of the routing of all layers over tokens, by domain."""

    def __init__(self, plan: ModelPlan) -> None:
        self._plan = plan
        self._sums: dict[tuple[int, str, str], Tensor] = {}  # (layer, component, domain) -> [3, N]
        self._tokens: dict[str, int] = {}

    def add(self, domain: str, routing: list[LayerRouting], tokens: int) -> None:
        """Adds one forward pass over ``tokens`` tokens of a domain."""
        self._tokens[domain] = self._tokens.get(domain, 0) + tokens
        for layer, parts in enumerate(routing):
            for component in COMPONENTS:
                part = getattr(parts, component)
                if part is None:
                    continue
                shared = component_plan(self._plan, component).shared
                scores = part.scores.double()
                among = scores[:, shared:] / scores[:, shared:].sum(dim=-1, keepdim=True).clamp(min=1e-300)
                chosen = torch.zeros_like(scores).scatter_(1, part.indices, 1.0)
                sums = torch.stack([scores, torch.cat([torch.zeros_like(scores[:, :shared]), among], 1), chosen]).sum(1)
                key = (layer, component, domain)
                self._sums[key] = self._sums[key] + sums.cpu() if key in self._sums else sums.cpu()

    def selection(self, layer: int, component: str) -> RouterSelection:
        """Means of one component of one layer."""
        shared = component_plan(self._plan, component).shared
        rows = {
            domain: (self._sums[layer, component, domain] / count).tolist() for domain, count in self._tokens.items()
        }
        return RouterSelection(
            layer=layer,
            component=component,
            shared=shared,
            probability={domain: row[0] for domain, row in rows.items()},
            specialized_probability={domain: [None] * shared + row[1][shared:] for domain, row in rows.items()},
            selected={domain: row[2] for domain, row in rows.items()},
            tokens=dict(self._tokens),
        )

    def overall(self, layer: int, component: str) -> tuple[list[float], list[float]]:
        """(selected, probability) of each sub-dimension over all tokens."""
        total = sum(self._tokens.values())
        sums = sum(self._sums[layer, component, domain] for domain in self._tokens)
        assert isinstance(sums, Tensor)
        means = sums / total
        return means[2].tolist(), means[0].tolist()


def routed(plan: ModelPlan) -> list[str]:
    """The components that have a router."""
    return [component for component in COMPONENTS if getattr(plan, component) is not None]


def component_plan(plan: ModelPlan, component: str) -> SubDimPlan:
    """N, K, S of a component. Raises :class:`UserError` for a dense one, or an unknown name."""
    if component not in COMPONENTS:
        raise UserError(f"component {component!r}: give {' or '.join(COMPONENTS)}")
    found = getattr(plan, component)
    if found is None:
        raise UserError(f"{plan.name}: {component} is dense, so it has no router; give another component or model")
    return found


def mohd_transformer(subject: Subject) -> Transformer:
    """The subject's transformer. Raises :class:`UserError` if it has no router."""
    transformer = subject.transformer
    if transformer is None or not transformer.plan.components:
        raise UserError(f"{subject.info['source']} has no sub-dimensions; give a MoHD checkpoint")
    return transformer


@torch.inference_mode()
def tally_routing(
    subject: Subject, corpus: Corpus, tokens: int, batch_size: int = 4, advance: Callable[[], None] = lambda: None
) -> RoutingTally:
    """Routes about ``tokens`` tokens, an equal part from every domain; ``advance`` is called after each batch."""
    transformer = mohd_transformer(subject)
    tally = RoutingTally(transformer.plan)
    for batch in corpus.batches(tokens, batch_size):
        out = transformer(batch.ids_BT.to(subject.device), logits=False)
        tally.add(batch.domain, out.routing, batch.ids_BT.numel())
        advance()
    return tally


def router_selection(
    checkpoint: str | Path,
    data: str | Path,
    *,
    layer: int = 5,
    component: str = "attention",
    tokens_per_domain: int = FIGURE_TOKENS,
    device: torch.device | None = None,
) -> RouterSelection:
    """Fig. 11 from a checkpoint (or an exported folder) and a prepared data folder (or raw text).

    Args:
        layer: counted from 0.
        component: ``attention`` or ``ffn``.
    Raises:
        UserError: not a MoHD model, no such layer, a dense component, or data of another tokenizer.
    """
    subject = load_subject(str(checkpoint), device=device)
    plan = mohd_transformer(subject).plan
    component_plan(plan, component)
    if not 0 <= layer < plan.num_hidden_layers:
        raise UserError(f"layer {layer}: {checkpoint} has layers 0 .. {plan.num_hidden_layers - 1}")
    corpus = open_corpus(Path(data), subject)
    return tally_routing(subject, corpus, tokens_per_domain * len(corpus.domains)).selection(layer, component)
