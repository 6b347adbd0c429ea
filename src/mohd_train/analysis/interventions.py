"""Interventions on one sub-dimension of one component, for every token, without touching weights or kernels.

``removed``: where the sub-dimension is active, the component reads zeros in its place and its output weight is 0. The choice
    of the others and their weights are unchanged, so the effect is that of its own contribution (and of what group fusion
    made of it). Its dims stay in the residual stream, and group fusion still writes to them. The router still reads the
    full x. For shared and specialized sub-dimensions.
``banned``: the router can't choose it; the next best specialized one takes its place, and activation scaling is recomputed.
    It shows how well the others can replace it. For specialized sub-dimensions that have an alternative.
``forced``: it is chosen for every token, in place of the lowest-scoring specialized one among the chosen. K is unchanged; its
    weight is its own score, scaled as usual. For specialized sub-dimensions, since shared ones are always active.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mohd_train.analysis.options import INTERVENTIONS
from mohd_train.config.plan import SubDimPlan
from mohd_train.model.llama import Transformer
from mohd_train.model.mohd import Routing, SubDimensions, select


def applies(kind: str, plan: SubDimPlan, index: int) -> bool:
    """Whether an intervention is meaningful for sub-dimension ``index``."""
    return kind == "removed" or (plan.has_choice and index >= plan.shared)


def sub_dimensions(transformer: Transformer, layer: int, component: str) -> SubDimensions:
    """The routed component of a layer."""
    found = getattr(transformer.blocks[layer], component).sub_dimensions
    assert isinstance(found, SubDimensions), f"{component} of layer {layer} is dense"
    return found


@contextmanager
def intervene(sub: SubDimensions, kind: str, index: int) -> Iterator[None]:
    """Within it, the component runs with the intervention.

    Args:
        kind: one of :data:`INTERVENTIONS` for which :func:`applies` is true.
        index: the sub-dimension.
    """
    assert kind in INTERVENTIONS, kind
    assert applies(kind, sub.plan, index), f"{kind} means nothing for sub-dimension {index} of {sub.plan}"
    if kind == "removed":
        with _removed(sub, index):
            yield
        return

    def choose(module: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, scores, _ = output
        ranks = args[1] if len(args) > 1 and args[1] is not None else logits  # what the choice is made by
        biased = ranks.clone()
        limits = torch.finfo(ranks.dtype) if ranks.is_floating_point() else torch.iinfo(ranks.dtype)
        biased[:, index] = limits.max if kind == "forced" else limits.min
        return logits, scores, select(biased, sub.plan.top_k, sub.plan.shared)

    handle = sub.router.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _removed(sub: SubDimensions, index: int) -> Iterator[None]:
    route, input_weights = sub.route, sub.input_weights

    def without(weights_TK: Tensor, routing: Routing) -> Tensor:
        return weights_TK.masked_fill(routing.indices == index, 0.0)

    def routed(*args: Any, **kwargs: Any) -> tuple[Routing, Any]:
        routing, selection = route(*args, **kwargs)
        return Routing(
            routing.indices, routing.scores, without(routing.weights, routing), routing.balance_loss
        ), selection

    def weighted(routing: Routing) -> Tensor:
        given = input_weights(routing)
        return without(torch.ones_like(routing.weights) if given is None else given, routing)

    sub.route, sub.input_weights = routed, weighted  # type: ignore[method-assign]
    try:
        yield
    finally:
        del sub.route, sub.input_weights  # restores the class's methods
