"""Detects a router that sends nearly every token to one specialized sub-dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from mohd_train.errors import UserError
from mohd_train.train.callbacks.routing_statistics import RoutingStatistics


class RouterCollapse(Callback):
    """A router has collapsed when one specialized sub-dimension is active for at least ``share`` of the tokens, in every check
    over ``batches`` batches.

    It checks whenever the routing statistics are taken, and must come after them. Where every specialized one is active for all
    tokens by construction, nothing can collapse.

    Args:
        statistics: of this run.
        share, batches: the threshold.
        stop: ends the run instead of warning once per collapse.
        notice: reports a line to the user.
    """

    def __init__(
        self,
        statistics: RoutingStatistics,
        *,
        share: float,
        batches: int,
        stop: bool,
        notice: Callable[[State, str, str], None],
    ) -> None:
        self.statistics, self.share, self.batches, self.stop, self.notice = statistics, share, batches, stop, notice
        self.since: dict[str, int] = {}  # "routing/layer0/ffn/share/5" -> batch since which this has held
        self._reported: set[str] = set()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Looks."""
        batch = state.timestamp.batch.value
        shares = self.statistics.specialized_shares(batch)
        if not shares:
            return
        self.since = {name: self.since.get(name, batch) for name, share in shares.items() if share >= self.share}
        self._reported &= self.since.keys()
        for name, first in self.since.items():
            if batch - first < self.batches or name in self._reported:
                continue
            self._reported.add(name)
            text = f"{name} is {shares[name]:.3f} since batch {first}: this router has collapsed"
            if self.stop:
                raise UserError(
                    f"batch {batch}: {text}; go back to a checkpoint before it, as another run with a larger "
                    "mohd.balance_loss_weight, or set router_collapse=warn"
                )
            self.notice(state, "router_collapse", f"{text}; a larger mohd.balance_loss_weight would spread the load")

    def state_dict(self) -> dict[str, Any]:
        """Since when."""
        return {
            "since": list(self.since.items())
        }  # a list: in a sharded checkpoint the keys of a mapping must be known beforehand

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.since = dict(state["since"])
