"""Validation loss over all domains together, next to Composer's one evaluator per domain."""

from __future__ import annotations

import math

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.metrics.nlp import LanguageCrossEntropy
from composer.utils import dist

NAME = "LanguageCrossEntropy"


class ValidationTotal(Callback):
    """After each round of evaluators logs ``metrics/eval/LanguageCrossEntropy`` and ``.../LanguagePerplexity``: every
    token of every domain counts the same, so the total is not the mean of the domains."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """A round within training."""
        self._log(state, logger)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """A round of its own."""
        self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        sums = torch.zeros(len(state.eval_metrics), 2, dtype=torch.float64)
        for row, metrics in zip(sums, state.eval_metrics.values(), strict=True):
            metric = metrics[NAME]
            assert isinstance(metric, LanguageCrossEntropy)
            row[0], row[1] = float(metric.sum_loss), float(metric.total_items)  # type: ignore[arg-type]
        sums = state.device.tensor_to_device(sums)
        dist.all_reduce(sums, reduce_operation="SUM")
        loss, tokens = sums.sum(dim=0).tolist()
        if tokens:
            mean = loss / tokens
            logger.log_metrics(
                {f"metrics/eval/{NAME}": mean, "metrics/eval/LanguagePerplexity": math.exp(min(mean, 700.0))}
            )
            per_domain = {
                label: row[0] / row[1] for label, row in zip(state.eval_metrics, sums.tolist(), strict=True) if row[1]
            }
            self.latest = {"all": mean} | per_domain
