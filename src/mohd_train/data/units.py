"""Units of tokenized text on disk: what a worker makes of some lines, in one file that is either whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mohd_train.data.manifest import write_atomic
from mohd_train.data.rows import parse_rows, range_lines
from mohd_train.data.tokenize import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # encoded at a time: Python's lists of ids are what memory goes to


@dataclass(frozen=True)
class Job:
    """One unit to tokenize: lines given, or those that begin in bytes start..stop-1 of `path`."""

    out: Path
    path: Path
    start: int = 0
    stop: int = 0
    lines: bytes | None = None
    source_bytes: int = 0  # of the raw file, for the progress bar


@dataclass(frozen=True)
class UnitInfo:
    """Counts of one unit; bad rows as (line within the unit from 1, what is wrong)."""

    lines: int
    documents: int
    tokens: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Unit:
    """Tokens of all documents end to end [tokens], tokens in each [documents], digest of each document's text [documents]."""

    tokens: NDArray[np.unsignedinteger]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint64]


def tokenize_unit(job: Job, tokenizer: Tokenizer) -> UnitInfo:
    """Parses and tokenizes one unit and writes it to `job.out`: BOS (where the tokenizer has one), ids, EOS."""
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
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    info = UnitInfo(counted.count, len(lengths), len(tokens), bad)
    _save(job.out, Unit(tokens, np.array(lengths, np.int64), np.array(digests, np.uint64)), info)
    return info


def text_digest(text: str) -> int:
    """64 bits that tell documents apart: copies of a document, but for white space around it, are equal."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def load_unit(path: Path) -> Unit:
    """Everything that :func:`tokenize_unit` wrote but the counts."""
    with np.load(path, allow_pickle=False) as file:
        return Unit(file["tokens"], file["lengths"], file["digests"])


def load_lengths(path: Path) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Only lengths and digests: a thousandth of the file."""
    with np.load(path, allow_pickle=False) as file:
        return file["lengths"], file["digests"]


def load_info(path: Path) -> UnitInfo:
    """Only the counts and bad rows."""
    with np.load(path, allow_pickle=False) as file:
        obj = json.loads(file["info"].tobytes())
    return UnitInfo(obj["lines"], obj["documents"], obj["tokens"], [(line, problem) for line, problem in obj["bad"]])


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
    """An iterator that knows how many lines it gave: blank ones too, so that line numbers are exact."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        line = next(self._lines)
        self.count += 1
        return line
