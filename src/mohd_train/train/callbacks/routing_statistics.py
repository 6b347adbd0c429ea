"""How the routers use their sub-dimensions, per layer and component."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.model.mohd import Routing


@dataclass
class _Sum:
    """Sums over the microbatches of one batch, one component."""

    plan: SubDimPlan
    active: Tensor  # [N] tokens for which a sub-dimension was active
    mass: Tensor  # [N] sum of the scores over the tokens
    balance: Tensor
    tokens: int = 0
    microbatches: int = 0


def selection_entropy(active_N: Tensor, plan: SubDimPlan) -> float:
    """Entropy of how often each specialized sub-dimension is chosen, over that of a uniform choice: 1 balanced, 0
    collapsed."""
    counts = active_N[plan.shared :].double()
    share = counts / counts.sum().clamp(min=1)
    return float(torch.special.entr(share).sum() / math.log(len(counts))) if len(counts) > 1 else 1.0


class RoutingStatistics(Callback):
    """Every ``interval`` batches, over all microbatches and ranks of that batch, logs under
    ``routing/layer{l}/{attention|ffn}/``:

    ``share/{i}`` share of tokens for which sub-dimension i is active (1 for shared ones), ``score/{i}`` its mean score,
    ``entropy`` of the choice among the specialized ones (:func:`selection_entropy`; only where there is a choice),
    ``balance_loss`` (weighted by beta; the mean over microbatches). Nothing is collected in between, nor for a dense
    model.
    """

    def __init__(self, plan: ModelPlan, interval: int) -> None:
        self.parts = plan.routed
        self.interval = interval
        self._sums: dict[str, _Sum] = {}
        self._shares: tuple[int, dict[str, float]] = (-1, {})  # batch, and shares of specialized sub-dimensions

    def specialized_shares(self, batch: int) -> dict[str, float]:
        """``routing/layer{l}/{component}/share/{i}`` of every specialized sub-dimension that a router may leave out;
        empty where this batch was not measured."""
        return self._shares[1] if self._shares[0] == batch else {}

    def _due(self, batch: int) -> bool:
        return batch % self.interval == 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Resets: a batch that ran out of memory is retried from here."""
        self._sums = {}

    def after_forward(self, state: State, logger: Logger) -> None:
        """Adds a microbatch."""
        if not self._due(state.timestamp.batch.value + 1):
            return
        outputs: Any = state.outputs
        for number, layer in enumerate(outputs.routing):
            for name, plan in self.parts.items():
                self._add(f"routing/layer{number}/{name}", plan, getattr(layer, name))

    def _add(self, key: str, plan: SubDimPlan, routing: Routing) -> None:
        active = torch.bincount(routing.indices.flatten(), minlength=plan.sub_dims)
        mass = routing.scores.double().sum(dim=0)
        total = self._sums.get(key)
        if total is None:
            total = self._sums[key] = _Sum(
                plan, torch.zeros_like(active), torch.zeros_like(mass), torch.zeros_like(mass[0])
            )
        total.active += active
        total.mass += mass
        total.balance += routing.balance_loss
        total.tokens += len(routing.indices)
        total.microbatches += 1

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs, after ``state.timestamp`` has moved on to this batch."""
        if not self._due(state.timestamp.batch.value):
            return
        shares: dict[str, float] = {}
        for key, total in self._sums.items():
            tail = torch.stack(
                [total.balance, total.balance.new_tensor(total.tokens), total.balance.new_tensor(total.microbatches)]
            )
            sums = torch.cat([total.active.double(), total.mass, tail])  # one reduction per component
            dist.all_reduce(sums, reduce_operation="SUM")
            n, (balance, tokens, microbatches) = total.plan.sub_dims, sums[-3:].tolist()
            metrics = {f"{key}/balance_loss": balance / microbatches}
            if total.plan.has_choice:
                metrics[f"{key}/entropy"] = selection_entropy(sums[:n], total.plan)
            for i, (active, mass) in enumerate(zip(sums[:n].tolist(), sums[n : 2 * n].tolist(), strict=True)):
                metrics |= {f"{key}/share/{i}": active / tokens, f"{key}/score/{i}": mass / tokens}
            if total.plan.has_choice:
                shares |= {name: metrics[name] for name in (f"{key}/share/{i}" for i in range(total.plan.shared, n))}
            logger.log_metrics(metrics)
        self._shares = (state.timestamp.batch.value, shares)
        self._sums = {}
