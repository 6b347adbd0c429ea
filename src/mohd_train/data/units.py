"""First stage of a preparation: raw files -> units of tokenized text, in parallel, with bad rows named.

A unit is one `.npz` file, written atomically, with what a worker made of some consecutive lines. A killed preparation
resumes with the units that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mohd_train.data.raw import Source, count_units, parse_rows, range_lines, unpacked_units
from mohd_train.data.tokenizer import Tokenizer
from mohd_train.data.workers import WorkerPool, worker_tokenizer
from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic
from mohd_train.utils.text import first_line

_BATCH_CHARACTERS = 1 << 20  # encoded at a time: most memory goes to Python's lists of ids
_EARLY_ROWS = 100_000  # rows after which a share of bad rows is judged before the end
_NAMED = 3
_PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal

Sources = dict[str, list[Source]]


@dataclass(frozen=True)
class Job:
    """One unit to tokenize: the given `lines`, or else those that begin at bytes start..stop-1 of `path`."""

    out: Path
    path: Path
    start: int = 0
    stop: int = 0
    lines: bytes | None = None
    source_bytes: int = 0  # of the raw file, for the progress bar
    source: Source | None = None  # to be compared with the file once the lines are read


@dataclass(frozen=True)
class UnitInfo:
    """Counts of one unit, and its bad rows as (line within the unit, from 1; what is wrong)."""

    lines: int
    documents: int
    tokens: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Unit:
    """Tokens of all documents concatenated [tokens]; of each document, its length in tokens and its text's digest [documents]."""

    tokens: NDArray[np.unsignedinteger]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint64]


def tokenize_unit(job: Job, tokenizer: Tokenizer) -> UnitInfo:
    """Parses and tokenizes one unit and writes it to `job.out`. A document is BOS (if the tokenizer has one), ids, EOS."""
    if job.source is not None:
        job.source.check_unchanged()
    lines = io.BytesIO(job.lines) if job.lines is not None else range_lines(job.path, job.start, job.stop)
    counted = _Counted(iter(lines))
    bad: list[tuple[int, str]] = []
    texts: list[str] = []
    parts: list[NDArray] = []
    lengths: list[int] = []
    digests: list[int] = []
    waiting = 0

    def flush() -> None:
        nonlocal waiting
        for ids in tokenizer.encode(texts):
            document = _with_boundaries(ids, tokenizer)
            parts.append(document)
            lengths.append(len(document))
        texts.clear()
        waiting = 0

    for row in parse_rows(counted):
        if row.text is None:
            bad.append((row.line, row.problem or ""))
            continue
        digests.append(text_digest(row.text))
        texts.append(row.text)
        waiting += len(row.text)
        if waiting >= _BATCH_CHARACTERS:
            flush()
    flush()
    if job.source is not None:
        job.source.check_unchanged()  # while it was read
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    info = UnitInfo(counted.count, len(lengths), len(tokens), bad)
    _save(job.out, Unit(tokens, np.array(lengths, np.int64), np.array(digests, np.uint64)), info)
    return info


def text_digest(text: str) -> int:
    """64-bit hash of a document without surrounding white space; copies of a document have the same one."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def tokenize_job(job: Job) -> UnitInfo:
    """:func:`tokenize_unit` in a worker, with the tokenizer it was started with."""
    return tokenize_unit(job, worker_tokenizer())


def load_unit(path: Path) -> Unit:
    """Everything that :func:`tokenize_unit` wrote except the counts."""
    with _opened(path) as file:
        return Unit(file["tokens"], file["lengths"], file["digests"])


def load_lengths(path: Path) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Only lengths and digests, a thousandth of the file."""
    with _opened(path) as file:
        return file["lengths"], file["digests"]


def load_info(path: Path) -> UnitInfo:
    """Only the counts and bad rows."""
    with _opened(path) as file:
        obj = json.loads(file["info"].tobytes())
        return UnitInfo(
            obj["lines"], obj["documents"], obj["tokens"], [(line, problem) for line, problem in obj["bad"]]
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a unit. One that can't be read is removed, so that the next run makes it again.

    Raises UserError if the file, which was complete when it was written, is now corrupt.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError) as error:
        path.unlink()
        raise UserError(
            f"{path} is corrupt ({first_line(error)}) and was removed; check the disk, and run the same command again: it "
            "makes the unit again"
        ) from error


def _save(path: Path, unit: Unit, info: UnitInfo) -> None:
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(vars(info)).encode(), np.uint8)
    np.savez(buffer, tokens=unit.tokens, lengths=unit.lengths, digests=unit.digests, info=text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _with_boundaries(ids: NDArray[np.uint32], tokenizer: Tokenizer) -> NDArray:
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.asarray(first, np.uint32), ids, np.asarray([tokenizer.eos_id], np.uint32)]).astype(
        tokenizer.dtype
    )


class _Counted:
    """An iterator that counts the lines it has yielded, blank ones included, so that line numbers are exact."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        line = next(self._lines)
        self.count += 1
        return line


@dataclass
class RowCount:
    """Good and bad rows so far, and whether there are enough bad ones to stop."""

    documents: int = 0
    bad: int = 0
    stop: bool = False

    def too_many(self, limit: float) -> bool:
        """Whether there are more bad rows than `limit`: below 1 a share of all rows, else a count."""
        return self.bad > (limit * (self.documents + self.bad) if limit < 1 else limit)


def tokenize_sources(
    sources: Sources,
    folder: Path,
    pool: WorkerPool,
    unit_bytes: int,
    limit: float,
    show: bool,
    only: Collection[tuple[str, int]] | None = None,
) -> RowCount:
    """Makes every unit that doesn't exist yet. Stops early if there are too many bad rows, which :func:`report_bad_rows`
    then reports. Units in progress are finished first: a missing unit would shift the line numbers of those after it.

    Args:
        only: of these sources, as (domain, number); None: of all.

    Returns:
        The rows, and whether it stopped early.

    Raises UserError if a compressed file is truncated or corrupt.
    """
    wanted = [
        (domain, index, source)
        for domain, files in sources.items()
        for index, source in enumerate(files)
        if only is None or (domain, index) in only
    ]
    total = sum(source.bytes for _, _, source in wanted)
    count = RowCount()
    with TokenProgress(total, show=show) as progress:
        jobs = _jobs(wanted, folder, unit_bytes, progress, count)
        for job, info in pool.run(tokenize_job, jobs):
            count.documents += info.documents
            count.bad += len(info.bad)
            progress.advance(job.source_bytes, info.documents, info.tokens)
            judged = limit >= 1 or count.documents + count.bad >= _EARLY_ROWS
            count.stop = count.stop or (judged and count.too_many(limit))
    return count


def unit_files(folder: Path, domain: str, index: int) -> list[Path]:
    """The units of source number `index` of a domain, in order."""
    return sorted(units_folder(folder, domain, index).glob("[0-9]*.npz"))


def units_folder(folder: Path, domain: str, index: int) -> Path:
    """Where the units of source number `index` of a domain are."""
    return folder / domain / f"{index:06d}"


def report_bad_rows(sources: Sources, folder: Path, report: Path, limit: float) -> int:
    """Writes each bad row as {file, line, problem} to `report`, with exact line numbers. Returns how many there are.

    Raises UserError, naming the first ones, if there are more than `limit`.
    """
    count = RowCount()
    rows: list[dict[str, str | int]] = []
    for domain, files in sources.items():
        for index, source in enumerate(files):
            line = 0
            for part, path in enumerate(unit_files(folder, domain, index)):
                if int(path.stem) != part:  # it stopped here; later units are left from a killed preparation
                    break
                info = load_info(path)
                rows += [{"file": source.name, "line": line + at, "problem": problem} for at, problem in info.bad]
                line += info.lines
                count.documents += info.documents
    count.bad = len(rows)
    write_atomic(report, "".join(json.dumps(row) + "\n" for row in rows))
    if count.too_many(limit):
        named = "; ".join(f"{row['file']}:{row['line']}: {row['problem']}" for row in rows[:_NAMED])
        allowed = f"{limit:.3%} of the rows" if limit < 1 else f"{limit:.0f}"
        raise UserError(
            f"{count.bad:,} bad rows among {count.documents + count.bad:,}, more than the {allowed} that --max-bad-rows allows "
            f"(all in {report}): {named}; fix them, or raise --max-bad-rows and run again: it resumes"
        )
    return count.bad


def _jobs(
    wanted: list[tuple[str, int, Source]], folder: Path, unit_bytes: int, progress: TokenProgress, count: RowCount
) -> Iterator[Job]:
    """Units that are still to be made, in order, until `count` says to stop. Existing units are counted."""

    def exists(path: Path, source_bytes: int) -> bool:
        if not path.exists():
            return False
        info = load_info(path)
        count.documents += info.documents
        count.bad += len(info.bad)
        progress.skip(source_bytes)
        return True

    for domain, index, source in wanted:
        place = units_folder(folder, domain, index)
        make = _unpacked_jobs if source.compression else _range_jobs
        for job in make(source, place, unit_bytes):
            if count.stop:
                return
            if not exists(job.out, job.source_bytes):
                yield job


def _range_jobs(source: Source, place: Path, unit_bytes: int) -> Iterator[Job]:
    for part in range(count_units(source, unit_bytes)):
        start, stop = part * unit_bytes, min((part + 1) * unit_bytes, source.bytes)
        yield Job(place / f"{part:07d}.npz", source.path, start, stop, source_bytes=stop - start, source=source)


def _read_sizes(note: Path) -> list[int] | None:
    """What :func:`_unpacked_jobs` noted; None if there is no note, or a corrupt one."""
    try:
        sizes = json.loads(note.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return sizes if isinstance(sizes, list) and all(isinstance(size, int) for size in sizes) else None


def _unpacked_jobs(source: Source, place: Path, unit_bytes: int) -> Iterator[Job]:
    """Unpacks the file, unless a note says how many units it gave and all of them exist."""
    note = place / "unpacked.json"
    sizes = _read_sizes(note)
    if sizes is not None and all((place / f"{part:07d}.npz").exists() for part in range(len(sizes))):
        for part, size in enumerate(sizes):
            yield Job(place / f"{part:07d}.npz", source.path, source_bytes=size)
        return
    sizes = []
    source.check_unchanged()
    for part, (lines, size) in enumerate(unpacked_units(source, unit_bytes)):
        yield Job(place / f"{part:07d}.npz", source.path, lines=lines, source_bytes=size, source=source)
        sizes.append(size)
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps(sizes))


class TokenProgress:
    """A progress bar on a terminal, else a plain line now and then: documents/s, tokens/s and the time left, measured by bytes
    of the raw files. Work done by an earlier run counts for the bar, but not for the rates."""

    def __init__(self, total_bytes: int, *, show: bool = True) -> None:
        self._total, self._done, self._new = max(1, total_bytes), 0, 0
        self._documents, self._tokens = 0, 0
        self._start = self._last = time.monotonic()
        self._show = show
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn("tokenizing"),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f}% {task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            if show and console.is_terminal
            else None
        )
        self._task = self._bar.add_task("", total=self._total) if self._bar else None

    def __enter__(self) -> TokenProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            self._say(final=True)

    def skip(self, source_bytes: int) -> None:
        """Counts work done by an earlier run."""
        self._done += source_bytes
        self._draw()

    def advance(self, source_bytes: int, documents: int, tokens: int) -> None:
        """Counts work done by this run."""
        self._done += source_bytes
        self._new += source_bytes
        self._documents += documents
        self._tokens += tokens
        self._draw()

    def _rates(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return f"{self._documents / elapsed:,.0f} docs/s, {self._tokens / elapsed:,.0f} tokens/s"

    def _draw(self) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=self._rates())
        elif time.monotonic() - self._last > _PLAIN_INTERVAL:
            self._say()

    def _say(self, *, final: bool = False) -> None:
        if not self._show:
            return
        self._last = time.monotonic()
        elapsed = self._last - self._start
        left = f", {(self._total - self._done) * elapsed / self._new:,.0f} s left" if self._new and not final else ""
        percent = 100 * self._done / self._total
        print(
            f"tokenizing: {percent:.1f}%, {self._documents:,} documents, {self._rates()}{left}",
            file=sys.stderr,
            flush=True,
        )
