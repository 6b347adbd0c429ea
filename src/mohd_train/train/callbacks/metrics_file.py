"""``metrics.jsonl``: every metric of a run, one JSON object a line, one line a batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from mohd_train.data.manifest import write_atomic
from mohd_train.errors import UserError

# Composer logs these before the step, so they'd be one behind the line's own batch and tokens.
DROPPED = frozenset(
    f"time/{name}"
    for name in ("batch", "sample", "token", "batch_in_epoch", "sample_in_epoch", "token_in_epoch", "epoch")
)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a half-written last one is left out. Raises UserError at one that is no JSON."""
    records = []
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error}); take the line out of the file") from None
    return records


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if isinstance(value, (int, float, str, bool)) or value is None else float(value)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


class MetricsFile(LoggerDestination):
    """Collects what is logged and writes ``{"batch": n, "tokens": t, name: value, ...}`` once the n-th batch is complete.

    ``batch`` and ``tokens`` count what has been trained on, so the losses of the first batch stand in line ``batch: 1``. A line is
    on disk before the checkpoint of its batch is written; on resuming, lines after the checkpoint's batch are cut, so that no
    step is ever recorded twice. Written by rank 0.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.enabled = dist.get_global_rank() == 0
        self._pending: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._last_offset = 0

    @property
    def latest(self) -> dict[str, Any]:
        """The last line written, whole."""
        return self._last

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Takes metrics for the next line; ``step`` is the line's own batch and not used."""
        if self.enabled:
            self._pending.update({name: _number(value) for name, value in metrics.items() if name not in DROPPED})

    def after_load(self, state: State, logger: Logger) -> None:
        """Cuts what lies after the batch from which this session goes on."""
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self.path) if record["batch"] <= state.timestamp.batch.value]
        write_atomic(self.path, b"".join(_line(record) for record in kept))
        self._last = kept[-1] if kept else {}
        self._last_offset = self.path.stat().st_size - len(_line(self._last)) if kept else 0

    def batch_end(self, state: State, logger: Logger) -> None:
        """Writes the batch's line, after all callbacks of the event: loggers come last. At BATCH_CHECKPOINT it would be too late,
        since a run killed between the checkpoint and its line would go on without the line."""
        self._write(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Adds the validation of this batch, before its checkpoint."""
        self._write(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Writes a validation that ran outside the training loop."""
        self._write(state)

    def close(self, state: State, logger: Logger) -> None:
        """Writes what came after the last batch, such as a validation at the end."""
        self._write(state)

    def _write(self, state: State) -> None:
        """Appends a line. What comes for the batch of the last line joins it: in a new file that takes the old one's place, since
        who reads while a line is written over, or a kill in between, would leave a line of which nothing can be made."""
        if not self.enabled or not self._pending:
            return
        record = {"batch": state.timestamp.batch.value, "tokens": state.timestamp.token.value} | self._pending
        self._pending = {}
        if self._last and self._last["batch"] == record["batch"]:
            record = self._last | record
            with self.path.open("rb") as file:
                before = file.read(self._last_offset)
            write_atomic(self.path, before + _line(record))
        else:
            with self.path.open("r+b") as file:
                self._last_offset = file.seek(0, os.SEEK_END)
                file.write(_line(record))
        self._last = record
