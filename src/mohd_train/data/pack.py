"""Tokenized units -> MDS shards of fixed-length samples. Documents are concatenated; a sample may hold several."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter

from mohd_train.data.manifest import HASH, SourceFile, Split
from mohd_train.data.units import load_unit
from mohd_train.data.validation import Sorter
from mohd_train.data.verify import shard_from_index
from mohd_train.utils.files import sync

SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class PackJob:
    """One domain. `units` in order: (file, index of its source, whether that source was given as validation)."""

    domain: str
    units: list[tuple[Path, int, bool]]
    sources: list[tuple[str, int, str]]  # name, bytes, fingerprint
    own_val: NDArray[np.uint64]
    all_val: NDArray[np.uint64]
    seq_len: int
    dtype: str
    folder: Path  # appears as a whole, by one rename
    scratch: Path


class SampleWriter:
    """Cuts a stream of tokens into samples of `seq_len` and writes them as one split."""

    def __init__(self, folder: Path, seq_len: int, dtype: str, sources: int) -> None:
        self._writer = MDSWriter(
            columns={"tokens": f"ndarray:{dtype}:{seq_len}"},
            out=str(folder),
            compression="zstd",
            hashes=[HASH],
            size_limit=SHARD_BYTES,
        )
        self._folder = folder
        self._seq_len = seq_len
        self._rest = np.empty(0, dtype)
        self._samples = 0
        self.by_source = np.zeros(sources, np.int64)

    def add(self, tokens: NDArray, documents: int, source: int) -> None:
        """Appends the tokens of whole documents."""
        self.by_source[source] += documents
        tokens = np.concatenate([self._rest, tokens])
        whole = len(tokens) // self._seq_len
        for sample in tokens[: whole * self._seq_len].reshape(whole, self._seq_len):
            self._writer.write({"tokens": sample})
        self._samples += whole
        self._rest = tokens[whole * self._seq_len :].copy()

    def finish(self, sources: list[tuple[str, int, str]], held_out: int) -> Split:
        """Ends the split. Tokens at its end that don't fill a sample are left out and counted."""
        self._writer.finish()
        index = json.loads((self._folder / "index.json").read_bytes())
        return Split(
            documents=int(self.by_source.sum()),
            tokens=self._samples * self._seq_len,
            samples=self._samples,
            tail_tokens=len(self._rest),
            held_out=held_out,
            shards=[shard_from_index(entry) for entry in index["shards"]],
            sources=[
                SourceFile(name, size, int(count), fingerprint)
                for (name, size, fingerprint), count in zip(sources, self.by_source, strict=True)
                if count
            ],
        )


def pack_domain(job: PackJob) -> dict[str, Split]:
    """Writes `job.folder/{train,val}` and returns their splits. The folder appears as a whole, by one rename."""
    shutil.rmtree(job.scratch, ignore_errors=True)
    shutil.rmtree(job.folder, ignore_errors=True)  # of an attempt that was killed before it was recorded
    train = SampleWriter(job.scratch / "train", job.seq_len, job.dtype, len(job.sources))
    val = SampleWriter(job.scratch / "val", job.seq_len, job.dtype, len(job.sources))
    sorter = Sorter(job.own_val, job.all_val)
    held_out = 0
    for path, source, given_val in job.units:
        unit = load_unit(path)
        if given_val:
            val.add(unit.tokens, len(unit.lengths), source)
            continue
        to_train, to_val = sorter.sort(unit.digests)
        train.add(_chosen(unit.tokens, unit.lengths, to_train), int(to_train.sum()), source)
        if to_val.any():
            val.add(_chosen(unit.tokens, unit.lengths, to_val), int(to_val.sum()), source)
        held_out += int((~to_train & ~to_val).sum())
    splits = {"train": train.finish(job.sources, held_out), "val": val.finish(job.sources, 0)}
    _make_durable(job.scratch)
    os.replace(job.scratch, job.folder)
    sync(job.folder.parent)
    return splits


def _chosen(tokens: NDArray, lengths: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray:
    return tokens if mask.all() else tokens[np.repeat(mask, lengths)]


def _make_durable(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
