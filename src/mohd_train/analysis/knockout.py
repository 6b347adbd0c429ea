"""Do sub-dimensions that are often active matter more? Perplexity with one of them removed, banned or forced, against its
routing share.

Shapes: B sequences of T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mohd_train.analysis.corpus import Corpus
from mohd_train.analysis.interventions import applies, intervene, sub_dimensions
from mohd_train.analysis.options import INTERVENTIONS, KnockoutOptions
from mohd_train.analysis.routing import RoutingTally, component_plan, mohd_transformer, routed
from mohd_train.analysis.study import Advance
from mohd_train.analysis.subject import Subject
from mohd_train.errors import UserError
from mohd_train.model.llama import LayerRouting, Transformer

Score = Callable[[], dict[str, float]]  # task -> accuracy of the model as it is now

DEFINITIONS = {
    "removed": "reads zeros in its place and weighs 0 in the output, for every token; choice and weights of the others stay",
    "banned": "the router may not choose it: the next best specialized one takes its place, scaled anew",
    "forced": "chosen for every token, in place of the specialized one that scored lowest among the chosen",
    "share": "share of the tokens for which the sub-dimension is active in the unchanged model (1 for a shared one)",
    "delta_nll": "mean cross-entropy (nats a token) less the unchanged model's; stderr over sequences, paired",
    "correlation": "of share with delta_nll over specialized sub-dimensions; within_layer: mean over layers and components",
}


@dataclass
class _Effect:
    """One intervention and its result: nats per token, one number per sequence."""

    layer: int
    component: str
    index: int
    kind: str
    nll: list[float] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def knockout(
    subject: Subject,
    corpus: Corpus,
    options: KnockoutOptions,
    score: Score | None = None,
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """Applies every intervention to every sub-dimension of the chosen layers. The record is plain numbers, JSON-ready.

    Args:
        score: returns task accuracies of the model in its current state; called once for the unchanged model and once per
            intervention.
        advance: called after each intervention on each batch, and after each scoring.
    Raises:
        UserError: not a MoHD model, an unknown intervention or a layer that doesn't exist.
    """
    transformer = mohd_transformer(subject)
    effects = list(_planned(transformer, options))
    baseline, tally = _Effect(-1, "", -1, ""), RoutingTally(transformer.plan)
    for batch in corpus.batches(options.tokens, options.batch_size):
        ids = batch.ids_BT.to(subject.device)
        nll, entries, routing = _unchanged(transformer, ids)
        tally.add(batch.domain, routing, ids.numel())
        baseline.nll += nll
        for effect in effects:
            with intervene(sub_dimensions(transformer, effect.layer, effect.component), effect.kind, effect.index):
                effect.nll += _from_layer(transformer, effect.layer, entries[effect.layer], ids)
            advance()
    if score is not None:
        baseline.tasks = score()
        advance()
        for effect in effects:
            with intervene(sub_dimensions(transformer, effect.layer, effect.component), effect.kind, effect.index):
                effect.tasks = score()
            advance()
    rows = [_row(effect, baseline, tally, transformer) for effect in effects]
    mean = float(np.mean(baseline.nll))
    return {
        "tokens": len(baseline.nll) * corpus.seq_len,
        "sequences": len(baseline.nll),
        "baseline": {"nll": mean, "perplexity": math.exp(mean), "tasks": baseline.tasks},
        "effects": rows,
        "correlation": {kind: correlation(rows, kind) for kind in options.kinds},
        "definitions": DEFINITIONS,
    }


def count_steps(transformer: Transformer, options: KnockoutOptions, batches: int, scored: bool) -> int:
    """How often :func:`knockout` calls ``advance``, for a progress bar."""
    effects = sum(1 for _ in _planned(transformer, options))
    return effects * batches + (effects + 1 if scored else 0)


def _planned(transformer: Transformer, options: KnockoutOptions) -> Iterator[_Effect]:
    layers = range(transformer.plan.num_hidden_layers)
    for layer in options.layers:
        if layer not in layers:
            raise UserError(f"--knockout-layers {layer}: the model has layers 0 .. {layers[-1]}")
    for kind in options.kinds:
        if kind not in INTERVENTIONS:
            raise UserError(f"--interventions {kind}: give some of {', '.join(INTERVENTIONS)}")
    for layer in options.layers or layers:
        for component in routed(transformer.plan):
            plan = component_plan(transformer.plan, component)
            for index in range(plan.sub_dims):
                for kind in options.kinds:
                    if applies(kind, plan, index):
                        yield _Effect(layer, component, index, kind)


Entry = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with: x [B, T, D], the rotary table, masks


def _unchanged(transformer: Transformer, ids_BT: Tensor) -> tuple[list[float], list[Entry], list[LayerRouting]]:
    """Cross-entropy of each sequence, the arguments of each block, and the routing."""
    entries: list[Entry] = []
    with ExitStack() as stack:
        for block in transformer.blocks:
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs: entries.append((args, kwargs)), with_kwargs=True
            )
            stack.callback(handle.remove)
        out = transformer(ids_BT, logits=False)
    return _nll(transformer, out.hidden, ids_BT), entries, out.routing


def _from_layer(transformer: Transformer, layer: int, entry: Entry, ids_BT: Tensor) -> list[float]:
    """Cross-entropy of each sequence, computed from ``layer`` on: an intervention doesn't change the layers before it."""
    (x, *rest), named = entry
    for block in transformer.blocks[layer:]:
        x, _ = block(x, *rest, **named)
    return _nll(transformer, transformer.norm(x), ids_BT)


def _nll(transformer: Transformer, hidden_BTD: Tensor, ids_BT: Tensor) -> list[float]:
    """Mean nats per predicted token, one number per sequence. Logits are computed for one sequence at a time."""
    losses = []
    for hidden_TD, ids_T in zip(hidden_BTD, ids_BT, strict=True):
        logits = transformer.head(hidden_TD[:-1])
        losses.append(F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids_T[1:]).item())
    return losses


def _row(effect: _Effect, baseline: _Effect, tally: RoutingTally, transformer: Transformer) -> dict[str, Any]:
    shares, probabilities = tally.overall(effect.layer, effect.component)
    change = np.array(effect.nll) - np.array(baseline.nll)
    stderr = float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else None
    mean = float(np.mean(effect.nll))
    return {
        "layer": effect.layer,
        "component": effect.component,
        "sub_dimension": effect.index,
        "shared": effect.index < component_plan(transformer.plan, effect.component).shared,
        "kind": effect.kind,
        "share": shares[effect.index],
        "probability": probabilities[effect.index],
        "perplexity": math.exp(mean),
        "delta_perplexity": math.exp(mean) - math.exp(float(np.mean(baseline.nll))),
        "delta_nll": float(change.mean()),
        "delta_nll_stderr": stderr,
        "tasks": {task: {"acc": acc, "delta": acc - baseline.tasks[task]} for task, acc in effect.tasks.items()},
    }


def correlation(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Correlation of routing share with the change in cross-entropy over specialized sub-dimensions: all of them, by component,
    and within layers."""
    chosen = [row for row in rows if row["kind"] == kind and not row["shared"]]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in chosen:
        groups.setdefault((row["layer"], row["component"]), []).append(row)
    within = [value for group in groups.values() if (value := _correlate(group)["spearman"]) is not None]
    found: dict[str, Any] = {"all": _correlate(chosen)}
    for component in sorted({row["component"] for row in chosen}):
        found[component] = _correlate([row for row in chosen if row["component"] == component])
    found["within_layer"] = {"spearman": float(np.mean(within)) if within else None, "groups": len(within)}
    return found


def _correlate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pearson's and Spearman's coefficients; None for fewer than three rows, or if a side doesn't vary."""
    share = np.array([row["share"] for row in rows], np.float64)
    change = np.array([row["delta_nll"] for row in rows], np.float64)
    return {
        "n": len(rows),
        "pearson": _pearson(share, change),
        "spearman": _pearson(_ranks(share), _ranks(change)),
    }


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; ties get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
