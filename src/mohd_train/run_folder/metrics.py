"""``metrics.jsonl``: every metric of a run, one JSON object a line, one line a batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a half-written last one is left out. Raises UserError for one that is no
    JSON."""
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


class MetricsWriter:
    """Writes ``{"batch": n, "tokens": t, name: value, ...}`` lines.

    Args:
        path: ``metrics.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        self._last_offset = 0

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
            with self.path.open("r+b") as file:
                self._last_offset = file.seek(0, os.SEEK_END)
                file.write(_line(record))
        self.last = record


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
