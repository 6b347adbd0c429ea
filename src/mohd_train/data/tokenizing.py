"""First stage of a preparation: all sources into tokenized units, in parallel, and the bad rows named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mohd_train.data.domains import Source
from mohd_train.data.manifest import write_atomic
from mohd_train.data.pool import WorkerPool, tokenize_job
from mohd_train.data.progress import TokenProgress
from mohd_train.data.rows import count_units, unpacked_units
from mohd_train.data.units import Job, load_info
from mohd_train.errors import UserError

_EARLY_ROWS = 100_000  # rows after which a share of bad rows is judged before the end
_NAMED = 3

Sources = dict[str, list[Source]]


@dataclass
class RowCount:
    """Good and bad rows so far, and whether the bad ones are enough to stop."""

    documents: int = 0
    bad: int = 0
    stop: bool = False

    def too_many(self, limit: float) -> bool:
        """Whether there are more bad rows than `limit`: a share of all rows below 1, else a count."""
        return self.bad > (limit * (self.documents + self.bad) if limit < 1 else limit)


def tokenize_sources(
    sources: Sources, folder: Path, pool: WorkerPool, unit_bytes: int, limit: float, show: bool
) -> None:
    """Makes every unit that is not there yet. Stops early when bad rows are too many; :func:`report_bad_rows` says so. What
    workers have in hand is finished then: a unit that lacks would shift the line numbers of those behind it.

    Raises UserError for a truncated or corrupt compressed file.
    """
    total = sum(source.bytes for domain in sources.values() for source in domain)
    count = RowCount()
    with TokenProgress(total, show=show) as progress:
        jobs = _jobs(sources, folder, unit_bytes, progress, count)
        for job, info in pool.run(tokenize_job, jobs):
            count.documents += info.documents
            count.bad += len(info.bad)
            progress.advance(job.source_bytes, info.documents, info.tokens)
            judged = limit >= 1 or count.documents + count.bad >= _EARLY_ROWS
            count.stop = count.stop or (judged and count.too_many(limit))


def unit_files(folder: Path, domain: str, index: int) -> list[Path]:
    """Units of source `index` of a domain, in order."""
    return sorted((folder / domain / f"{index:06d}").glob("[0-9]*.npz"))


def report_bad_rows(sources: Sources, folder: Path, report: Path, limit: float) -> int:
    """Writes each bad row as {file, line, problem} to `report`, with exact line numbers, and returns how many there are.

    Raises UserError, naming the first, when there are more than `limit`.
    """
    count = RowCount()
    rows: list[dict[str, str | int]] = []
    for domain, files in sources.items():
        for index, source in enumerate(files):
            line = 0
            for part, path in enumerate(unit_files(folder, domain, index)):
                if int(path.stem) != part:  # stopped before it; what lies behind is of a killed preparation
                    break
                info = load_info(path)
                rows += [{"file": source.name, "line": line + at, "problem": problem} for at, problem in info.bad]
                line += info.lines
                count.documents += info.documents
    count.bad = len(rows)
    write_atomic(report, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if count.too_many(limit):
        named = "; ".join(f"{row['file']}:{row['line']}: {row['problem']}" for row in rows[:_NAMED])
        allowed = f"{limit:.3%} of the rows" if limit < 1 else f"{limit:.0f}"
        raise UserError(
            f"{count.bad:,} bad rows among {count.documents + count.bad:,}, more than the {allowed} that --max-bad-rows allows "
            f"(all in {report}): {named}; mend them, or raise --max-bad-rows and run again: it resumes"
        )
    return count.bad


def _jobs(sources: Sources, folder: Path, unit_bytes: int, progress: TokenProgress, count: RowCount) -> Iterator[Job]:
    """Units yet to be made, in order, until `count` says to stop; those found made are counted."""

    def made(path: Path, source_bytes: int) -> bool:
        if not path.exists():
            return False
        info = load_info(path)
        count.documents += info.documents
        count.bad += len(info.bad)
        progress.skip(source_bytes)
        return True

    for domain, files in sources.items():
        for index, source in enumerate(files):
            place = folder / domain / f"{index:06d}"
            make = _unpacked_jobs if source.compression else _range_jobs
            for job in make(source, place, unit_bytes):
                if count.stop:
                    return
                if not made(job.out, job.source_bytes):
                    yield job


def _range_jobs(source: Source, place: Path, unit_bytes: int) -> Iterator[Job]:
    for part in range(count_units(source, unit_bytes)):
        start, stop = part * unit_bytes, min((part + 1) * unit_bytes, source.bytes)
        yield Job(place / f"{part:07d}.npz", source.path, start, stop, source_bytes=stop - start)


def _unpacked_jobs(source: Source, place: Path, unit_bytes: int) -> Iterator[Job]:
    """Unpacks the file unless a note says into how many units it went, and all of them are there."""
    note = place / "unpacked.json"
    if note.exists():
        sizes = json.loads(note.read_bytes())
        if all((place / f"{part:07d}.npz").exists() for part in range(len(sizes))):
            for part, size in enumerate(sizes):
                yield Job(place / f"{part:07d}.npz", source.path, source_bytes=size)
            return
    sizes = []
    for part, (lines, size) in enumerate(unpacked_units(source, unit_bytes)):
        yield Job(place / f"{part:07d}.npz", source.path, lines=lines, source_bytes=size)
        sizes.append(size)
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps(sizes).encode())
