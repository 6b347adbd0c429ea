"""Composer's logger that writes ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from mohd_train.errors import UserError
from mohd_train.run_folder.metrics import MetricsWriter

# Composer logs these before the step, so they'd be one behind the line's own batch and tokens.
DROPPED = frozenset(
    f"time/{name}"
    for name in ("batch", "sample", "token", "batch_in_epoch", "sample_in_epoch", "token_in_epoch", "epoch")
)


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if isinstance(value, (int, float, str, bool)) or value is None else float(value)


class MetricsFile(LoggerDestination):
    """Collects what is logged and writes a line once the batch is complete.

    ``batch`` and ``tokens`` count what has been trained on, so the losses of the first batch are in line ``batch: 1``.
    A line is on disk before the checkpoint of its batch is written. On resuming, lines after the checkpoint's batch are
    cut, so that no step is ever recorded twice. Written by rank 0.

    Args:
        path: ``metrics.jsonl``.
        failed: called, instead of raising, if a line can't be written, so that the run can save first. The line is retried
            together with the next one.
    """

    def __init__(self, path: str | Path, failed: Callable[[UserError], None] | None = None) -> None:
        self.failed = failed
        self.enabled = dist.get_global_rank() == 0
        self._writer = MetricsWriter(Path(path))
        self._pending: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """``metrics.jsonl``."""
        return self._writer.path

    @property
    def latest(self) -> dict[str, Any]:
        """The last line written."""
        return self._writer.last

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Collects metrics for the next line; ``step`` is unused: the line has its own batch."""
        if self.enabled:
            self._pending.update({name: _number(value) for name, value in metrics.items() if name not in DROPPED})

    def after_load(self, state: State, logger: Logger) -> None:
        """Removes what was logged after the batch from which this session resumes."""
        if self.enabled:
            self._writer.cut_after(state.timestamp.batch.value)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Writes the batch's line after all callbacks of the event (loggers come last). BATCH_CHECKPOINT would be too
        late: a run killed between the checkpoint and its line would resume without the line."""
        self._write(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Adds this batch's validation, before its checkpoint."""
        self._write(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Writes a validation that ran outside the training loop."""
        self._write(state)

    def close(self, state: State, logger: Logger) -> None:
        """Writes what was logged after the last batch, such as a final validation."""
        self._write(state)

    def _write(self, state: State) -> None:
        if self.enabled and self._pending:
            progress = {"batch": state.timestamp.batch.value, "tokens": state.timestamp.token.value}
            try:
                self._writer.write(progress | self._pending)
            except OSError as error:
                if self.failed is None or isinstance(error, FileNotFoundError):  # the run folder was removed
                    raise
                self.failed(
                    UserError(
                        f"{self.path} can't be written ({error.strerror}); this batch is saved if there is room for it: "
                        "make room, then resume with autoresume=true"
                    )
                )
                return
            self._pending = {}
