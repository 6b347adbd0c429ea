"""``metrics.jsonl``: every metric of a run, one JSON object per line, one line per batch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic

SYNC_SECONDS = 1.0  # between two flushes to disk: a power loss costs at most this much
BLOCK = 1 << 16  # bytes, of reading backwards


def read_metrics(path: str | Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a half-written last one is left out. A file that doesn't exist has none.

    Args:
        notes: where broken lines are reported; they are then left out.

    Raises:
        UserError: a broken line, and ``notes`` is None.
    """
    records, broken = [], []
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, 1):
        line = line.strip(b"\0")  # what a power loss leaves in place of pages that never reached the disk
        if line.endswith(b"\n") and line.strip():
            try:
                record = json.loads(line)
                if notes is not None:
                    record["batch"], record["tokens"]
                records.append(record)
            except (ValueError, KeyError, TypeError) as error:
                if notes is None:
                    raise UserError(
                        f"{path}, line {number}: not JSON ({error}); remove the line from the file"
                    ) from None
                broken.append(number)
    if notes is not None and broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        notes.append(f"{path}, line {broken[0]}{others}: not the JSON of a batch, set aside")
    return records


def lines_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a metrics file, the last one first. It may be large, so it is read block by block from its end; the run
    may be writing it, so a half-written line is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        rest = b""
        while position > 0:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines):
                yield from _parsed(line)
        yield from _parsed(rest)


def last_values(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """The newest value of each of ``names`` in a metrics file; those never logged are left out."""
    wanted, found = set(names), dict[str, Any]()
    for record in lines_backwards(path):
        found = {name: record[name] for name in wanted if name in record} | found
        if len(found) == len(wanted):
            break
    return found


def _parsed(line: bytes) -> Iterator[dict[str, Any]]:
    try:
        line = line.strip(b"\0 ")  # zeros: what a power loss leaves
        value = json.loads(line) if line else None
    except ValueError:
        return
    if isinstance(value, dict):
        yield value


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
        """Removes the lines after ``batch``: a session that resumes there writes them again."""
        kept = [record for record in read_metrics(self.path) if record["batch"] <= batch]
        write_atomic(self.path, b"".join(_line(record) for record in kept))
        self.last = kept[-1] if kept else {}
        self._last_offset = self.path.stat().st_size - len(_line(self.last)) if kept else 0

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line. A record for the batch of the last line is merged into it, in a new file that replaces the old one:
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
                    file.truncate(offset)  # no partial line
                    raise
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            self._last_offset = offset
        self.last = record


def _write_all(file: FileIO, content: bytes) -> None:
    """A raw write may accept only a part, as on a disk that is almost full."""
    while content:
        content = content[file.write(content) :]


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
