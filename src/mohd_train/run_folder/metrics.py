"""``metrics.jsonl``: every metric of a run, one JSON object a line, one line a batch."""

from __future__ import annotations

import json
import os
import time
from io import FileIO
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic

SYNC_SECONDS = 1.0  # between two flushes to the disk: a power loss costs at most as much


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a half-written last one is left out. Raises UserError for one that is no
    JSON."""
    records = []
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, 1):
        line = line.strip(b"\0")  # what a power loss leaves of pages that never reached the disk
        if line.endswith(b"\n") and line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error}); take the line out of the file") from None
    return records


class MetricsWriter:
    """Writes ``{"batch": n, "tokens": t, name: value, ...}`` lines.

    Args:
        path: ``metrics.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        self._last_offset = 0
        self._synced = 0.0

    def cut_after(self, batch: int) -> None:
        """Leaves out the lines after ``batch``: a session that resumes there writes them again."""
        kept = [record for record in read_metrics(self.path) if record["batch"] <= batch]
        write_atomic(self.path, b"".join(_line(record) for record in kept))
        self.last = kept[-1] if kept else {}
        self._last_offset = self.path.stat().st_size - len(_line(self.last)) if kept else 0

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line. What comes for the batch of the last line joins it, in a new file that replaces the old one:
        a reader of a line that is being overwritten, or a kill in between, would be left with a broken one."""
        if self.last and self.last["batch"] == record["batch"]:
            record = self.last | record
            with self.path.open("rb") as file:
                before = file.read(self._last_offset)
            write_atomic(self.path, before + _line(record))
        else:
            with self.path.open("r+b", buffering=0) as file:
                offset = file.seek(0, os.SEEK_END)
                try:
                    _write_all(file, _line(record))
                except OSError:
                    file.truncate(offset)  # no half line
                    raise
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            self._last_offset = offset
        self.last = record


def _write_all(file: FileIO, content: bytes) -> None:
    """A raw write may take a part only, as on a disk that is about to be full."""
    while content:
        content = content[file.write(content) :]


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
