"""Stores the block sizes that the Triton kernels chose in each checkpoint, and restores them when a run resumes."""

from __future__ import annotations

import json
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from mohd_train.kernels import ops
from mohd_train.train.faults import Notices


class KernelSizes(Callback):
    """Kernels choose their block sizes by timing them at their first call, and round differently with other sizes: a run that
    resumed with others would not be bit-exact. All processes use the same ones, rank 0's where it has chosen.

    Args:
        notice: reports why the checkpoint's sizes can't be used on this GPU.
    """

    def __init__(self, notice: Notices) -> None:
        self.notice = notice
        self._refused: str | None = None
        self._agreed = False

    def batch_end(self, state: State, logger: Logger) -> None:
        """After a session's first batch, in which nearly all are chosen."""
        if not self._agreed:
            self._agree()
            self._agreed = True

    def state_dict(self) -> dict[str, Any]:
        """One string, as the keys of a mapping in a sharded checkpoint must be known beforehand. Called by every process."""
        return {"json": json.dumps(self._agree())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called before any kernel has run."""
        self._refused = ops.use_sizes(json.loads(state["json"]))

    def after_load(self, state: State, logger: Logger) -> None:
        """One line, where sizes must be chosen anew."""
        if self._refused is not None:
            self.notice(state, "kernels", self._refused)

    def _agree(self) -> dict[str, Any]:
        """What all processes use from now on: for each launch the choice of the lowest rank that made one."""
        everyone = dist.all_gather_object(ops.chosen_sizes())
        gpus = {found["gpu"]: None for found in everyone if found}
        if not gpus:
            return {}
        sizes: dict[str, Any] = {}
        for found in reversed(everyone):
            sizes |= found.get("sizes", {})
        together = {"gpu": next(iter(gpus)), "sizes": sizes}
        if len(gpus) == 1 and any(found != together for found in everyone):
            ops.use_sizes(together)
        return together
