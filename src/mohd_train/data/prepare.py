"""Raw rows -> a prepared folder, in three stages: tokenize units, choose validation documents, pack. A killed run resumes
within its stage.

The first stage can be shared by many machines on one file system (:func:`prepare_shard`): each tokenizes some of the raw files, and
a plain call finishes what they have made.

Intermediate files are in `OUT/.work`, which is removed once the manifest is written. The result depends on the raw files,
the tokenizer, `seq_len` and `val_tokens` alone, byte for byte, and not on the number of workers or on kills in between.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mohd_train.checkpoint.identity import is_tokenizer
from mohd_train.data import validation
from mohd_train.data.manifest import (
    BAD_ROWS,
    MANIFEST,
    TOKENIZER_FOLDER,
    VERSION,
    Manifest,
    Split,
    TokenizerInfo,
    load_manifest,
    save_manifest,
    split_from_dict,
)
from mohd_train.data.pack import PackJob, pack_domain
from mohd_train.data.raw import UNIT_BYTES, RawData, find_sources, shares
from mohd_train.data.tokenizer import Tokenizer, load_tokenizer
from mohd_train.data.units import RowCount, load_lengths, report_bad_rows, tokenize_sources, unit_files, units_folder
from mohd_train.data.workers import WorkerPool
from mohd_train.errors import UserError
from mohd_train.storage import refuse_remote
from mohd_train.utils.files import Lock, write_atomic
from mohd_train.utils.text import first_line

WORK = ".work"
PLAN = "plan.json"  # in WORK: the settings of the preparation
TOKENIZED = "tokenized"  # in WORK: a file for each shard that is
SHARDS = "shards"  # in WORK: the locks of the machines that tokenize
LOCK = ".lock"  # not in WORK, which is removed before the lock is released
LOCK_WAIT, SHARD_WAIT = 15.0, 300.0  # seconds


@dataclass(frozen=True)
class Request:
    """Arguments of `mohd prepare`. `max_bad_rows`: below 1 a share of the rows, else a count."""

    raw: str
    out: str
    tokenizer: str
    domains: tuple[str, ...] | None = None
    seq_len: int = 4096
    val_tokens: int = 2_000_000
    workers: int = 0  # 0: one per core
    max_bad_rows: float = 0.01
    show_progress: bool = True
    unit_bytes: int = UNIT_BYTES


@dataclass(frozen=True)
class Prepared:
    """The folder's manifest, and whether the folder was finished before this call."""

    manifest: Manifest
    already_done: bool


def prepare(request: Request) -> Prepared:
    """Prepares `request.raw` into `request.out`, resuming an earlier call with the same settings that was interrupted.

    Raises UserError for bad input, too many bad rows, a folder that holds another preparation, a full disk.
    """
    _check(request)
    raw = find_sources(request.raw, request.domains)
    tokenizer = load_tokenizer(request.tokenizer)
    preparation = Preparation(request, raw, tokenizer)
    out = preparation.out
    finished = preparation.finished()
    leftovers = any((out / name).exists() for name in (WORK, LOCK)) and os.access(out, os.W_OK)
    if finished is not None and not leftovers:
        return Prepared(finished, True)
    try:
        return _prepare_alone(preparation)
    except OSError as error:
        raise _full(error, out) from error


def _check(request: Request) -> None:
    if request.seq_len < 2:
        raise UserError(f"--seq-len {request.seq_len}: a sample needs at least 2 tokens")
    if request.val_tokens < 0 or request.max_bad_rows < 0 or request.workers < 0:
        raise UserError("--val-tokens, --max-bad-rows and --workers can't be negative")
    refuse_remote(request.raw, "--raw", "copy the raw rows here first (aws s3 sync s3://... FOLDER)")
    refuse_remote(request.out, "--out", "then copy it (aws s3 sync OUT s3://...), and train with data.remote=s3://...")


def prepare_shard(request: Request, number: int, count: int) -> tuple[int, int]:
    """Tokenizes one of ``count`` parts of the raw files, as one of as many processes on one file system; :func:`prepare` finishes.

    The largest file goes to the part that has least so far, and so on: every process divides them alike. A part that was killed
    is resumed by the same call, or else by :func:`prepare`.

    Args:
        number: from 0.

    Returns:
        How many files it has, and how many bytes.

    Raises:
        UserError: as :func:`prepare`; or the same part, or the finishing, is already running.
    """
    if not 0 <= number < count:
        raise UserError(f"--shard {number}/{count}: shards are numbered from 0 to {count - 1}")
    _check(request)
    preparation = Preparation(request, find_sources(request.raw, request.domains), load_tokenizer(request.tokenizer))
    mine = preparation.part(number, count)
    files = [preparation.sources[domain][index] for domain, index in mine]
    found = len(files), sum(source.bytes for source in files)
    try:
        preparation.check_out()
        preparation.out.mkdir(parents=True, exist_ok=True)
        start = preparation.lock(wait=SHARD_WAIT)  # the others start at the same time
        try:
            if preparation.finished() is not None:
                return found
            preparation.open_work()
            for name in (SHARDS, TOKENIZED):
                (preparation.work / name).mkdir(exist_ok=True)
            busy = f"shard {number} of {count} is already running in {preparation.out} ({{holder}})"
            lock = Lock(preparation.work / SHARDS / f"{number}-of-{count}", busy)
        finally:
            start.release()
        try:
            with preparation.pool() as pool:
                rows = preparation.tokenize(pool, mine)
        finally:
            lock.release()
        if rows.stop:
            raise UserError(
                f"shard {number} of {count} stopped at {rows.bad:,} bad rows among {rows.bad + rows.documents:,}; the same command "
                "without --shard names them, or raise --max-bad-rows"
            )
        if preparation.work.is_dir():  # unless the finishing call has made the rest
            (preparation.work / TOKENIZED / f"{number}-of-{count}").touch()
    except OSError as error:
        raise _full(error, preparation.out) from error
    return found


def wait_for_shards(request: Request, count: int, every: float = 5.0) -> None:
    """Returns when each of ``count`` parts is tokenized, or the folder is finished. Reports how many are whenever that changes."""
    out, said = Path(request.out), -1
    while not (out / MANIFEST).exists() and said < count:
        done = sum((out / WORK / TOKENIZED / f"{number}-of-{count}").exists() for number in range(count))
        if done != said:
            print(f"{done} of {count} shards are tokenized", flush=True)
            said = done
        if done < count:
            time.sleep(every)


def _full(error: OSError, out: Path) -> Exception:
    if error.errno == errno.ENOSPC:
        return UserError(f"the disk of {out} is full; free space, run the same command again: it resumes")
    return error


def _prepare_alone(preparation: Preparation) -> Prepared:
    """Runs the preparation under the folder's lock, which covers the look for a manifest as well as the work."""
    out = preparation.out
    preparation.check_out()
    out.mkdir(parents=True, exist_ok=True)
    lock = preparation.lock()
    try:
        finished = (
            preparation.finished()
        )  # perhaps finished since the first check, while this process waited for the lock
        manifest = finished
        if manifest is None:
            preparation.open_work()
            preparation.check_shards()
            manifest = preparation.run()
        shutil.rmtree(preparation.work, ignore_errors=True)
        # Whoever waits for it, or creates another one, will find the manifest and do nothing: two locks do no harm now.
        (out / LOCK).unlink(missing_ok=True)
        return Prepared(manifest, finished is not None)
    finally:
        lock.release()


class Preparation:
    """The stages of one preparation."""

    def __init__(self, request: Request, raw: RawData, tokenizer: Tokenizer) -> None:
        self.request, self.sources, self.tokenizer = request, raw.domains, tokenizer
        self.notes = list(raw.notes)
        self.out = Path(request.out)
        self.work = self.out / WORK
        self.units = self.work / "units"
        self.fingerprints = {source.name: source.fingerprint() for domain in self.sources.values() for source in domain}
        listed = [
            [domain, s.name, s.split, s.bytes, self.fingerprints[s.name]]
            for domain in self.sources
            for s in self.sources[domain]
        ]
        self.settings: dict[str, Any] = {
            "tokenizer": tokenizer.sha256,
            "seq_len": request.seq_len,
            "val_tokens": request.val_tokens,
            "sources": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        }

    def finished(self) -> Manifest | None:
        """The manifest, if the folder is finished. Raises UserError if it is that of another preparation."""
        if not (self.out / MANIFEST).exists():
            return None
        manifest = load_manifest(self.out)
        _refuse_other(self.out, manifest.settings, self.settings, self.tokenizer)
        return manifest

    def lock(self, wait: float = LOCK_WAIT) -> Lock:
        """The folder's lock. Raises UserError if another preparation holds it."""
        busy = f"another preparation is running in {self.out} ({{holder}}); wait for it, or choose another --out"
        return Lock(self.out / LOCK, busy, wait)

    def part(self, number: int, count: int) -> list[tuple[str, int]]:
        """The sources of one of ``count`` parts of about the same size, as (domain, number)."""
        everything = [(domain, index) for domain, files in self.sources.items() for index in range(len(files))]
        everything.sort(key=lambda one: -self.sources[one[0]][one[1]].bytes)
        sizes: list[int] = [0] * count
        mine = []
        for domain, index in everything:
            least = sizes.index(min(sizes))
            sizes[least] += self.sources[domain][index].bytes
            if least == number:
                mine.append((domain, index))
        return mine

    def check_shards(self) -> None:
        """Raises UserError while a shard is running."""
        for path in sorted((self.work / SHARDS).glob("*-of-*")):
            busy = (
                f"shard {path.name.replace('-', ' ')} is running in {self.out} ({{holder}}); finish when all are done"
            )
            Lock(path, busy, 0).release()

    def pool(self) -> WorkerPool:
        """The processes that tokenize and pack."""
        return WorkerPool(self.request.workers or os.cpu_count() or 1, self.tokenizer)

    def tokenize(self, pool: WorkerPool, only: Collection[tuple[str, int]] | None = None) -> RowCount:
        """The first stage, for all sources or these."""
        asked = self.request
        return tokenize_sources(
            self.sources, self.units, pool, asked.unit_bytes, asked.max_bad_rows, asked.show_progress, only
        )

    def check_out(self) -> None:
        """Raises UserError if `OUT` is not a folder, or holds anything but a preparation."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; name a folder")
        if (self.work / PLAN).exists() or (self.out / MANIFEST).exists() or not self.out.exists():
            return
        if any(path.name not in (WORK, LOCK) for path in self.out.iterdir()):
            raise UserError(f"--out {self.out} holds other files and no {MANIFEST}; choose a new or empty folder")

    def open_work(self) -> None:
        """Creates or finds `OUT/.work`. Refuses a folder that holds anything but an unfinished part of this preparation."""
        self.check_out()
        plan = self.work / PLAN
        settings = self.settings | {"unit_bytes": self.request.unit_bytes}
        if plan.exists():
            _refuse_other(self.out, self._read(plan), settings, self.tokenizer)
            return
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomic(plan, json.dumps(settings))

    def _read(self, path: Path) -> dict[str, Any]:
        """A JSON file of `.work`. Raises UserError if it is corrupt."""
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is corrupt ({first_line(error)}); remove {self.work}, and run again") from error
        assert isinstance(found, dict)
        return found

    def _check_sources(self) -> None:
        """Raises UserError if a raw file changed since it was found. Its units are removed: they may hold part of the change."""
        for domain, files in self.sources.items():
            for index, source in enumerate(files):
                try:
                    source.check_unchanged()
                    if source.fingerprint() == self.fingerprints[source.name]:
                        continue
                    raise UserError(
                        f"{source.path} changed while it was prepared (its content differs); once the file is complete, prepare "
                        "it into a new folder"
                    )
                except UserError:
                    shutil.rmtree(units_folder(self.units, domain, index), ignore_errors=True)
                    raise

    def run(self) -> Manifest:
        """All stages. The caller holds the lock and has made sure that there is no manifest yet."""
        info = self._save_tokenizer()
        with self.pool() as pool:
            self.tokenize(pool)
            self._check_sources()
            bad_rows = report_bad_rows(self.sources, self.units, self.out / BAD_ROWS, self.request.max_bad_rows)
            domains = self._pack(self._validation(), pool)
        manifest = Manifest(
            version=VERSION,
            tokenizer=info,
            seq_len=self.request.seq_len,
            dtype=self.tokenizer.dtype,
            domains=domains,
            bad_rows=bad_rows,
            settings=self.settings,
            notes=self.notes,
        )
        save_manifest(manifest, self.out)
        return manifest

    def _save_tokenizer(self) -> TokenizerInfo:
        scratch, folder, t = self.work / TOKENIZER_FOLDER, self.out / TOKENIZER_FOLDER, self.tokenizer
        shutil.rmtree(scratch, ignore_errors=True)
        files = t.save(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
        return TokenizerInfo(t.sha256, t.vocab_size, t.bos_id, t.eos_id, t.name, files)

    def _documents(self, domain: str, split_name: str) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Lengths and digests, unit by unit, of the domain's sources in one split."""
        for index, source in enumerate(self.sources[domain]):
            if source.split == split_name:
                yield from map(load_lengths, unit_files(self.units, domain, index))

    def _validation(self) -> dict[str, NDArray[np.uint64]]:
        """Digests of each domain's validation documents, which are given by the user or else chosen."""
        sizes = {}
        for domain in self.sources:
            sizes[domain] = sum(int(lengths.sum()) for lengths, _ in self._documents(domain, "train"))
            if not sizes[domain]:
                raise UserError(
                    f"domain {domain} has no usable row ({self.out / BAD_ROWS} says why); leave it out: --domains"
                )
        proportions = shares(self.sources, sizes)
        digests = {}
        for domain, files in self.sources.items():
            if any(source.split == "val" for source in files):
                given = [d for _, d in self._documents(domain, "val")]
                digests[domain] = np.unique(np.concatenate([np.empty(0, np.uint64), *given]))
                continue
            wanted = validation.target(
                self.request.val_tokens, proportions[domain], sizes[domain], self.request.seq_len
            )
            digests[domain] = validation.select(self._documents(domain, "train"), wanted.tokens, sizes[domain])
            if wanted.tokens < wanted.asked:
                self.notes.append(
                    f"{domain}: {wanted.asked:,} validation tokens asked for, limited to {wanted.tokens:,}: "
                    f"the domain has {sizes[domain]:,}"
                )
        return digests

    def _pack(self, chosen: dict[str, NDArray[np.uint64]], pool: WorkerPool) -> dict[str, dict[str, Split]]:
        """Packs the domains that are not packed yet, the largest first, each in one worker."""
        everywhere = np.unique(np.concatenate(list(chosen.values())))
        packed = self.work / "packed"
        packed.mkdir(exist_ok=True)
        todo = [domain for domain in self.sources if not (packed / f"{domain}.json").exists()]
        todo.sort(key=lambda domain: -sum(source.bytes for source in self.sources[domain]))
        jobs = [self._pack_job(domain, chosen[domain], everywhere) for domain in todo]
        for job, splits in pool.run(pack_domain, jobs):
            record = {name: asdict(one) for name, one in splits.items()}
            write_atomic(packed / f"{job.domain}.json", json.dumps(record))
        domains = {}
        for domain in sorted(self.sources):
            record = self._read(packed / f"{domain}.json")
            domains[domain] = {name: split_from_dict(one) for name, one in record.items()}
            for name, one in domains[domain].items():
                if not one.samples and (name == "train" or self.request.val_tokens):
                    self.notes.append(
                        f"{domain}: its {name} documents do not fill one sample of {self.request.seq_len} tokens"
                    )
        return domains

    def _pack_job(self, domain: str, own: NDArray[np.uint64], everywhere: NDArray[np.uint64]) -> PackJob:
        files = self.sources[domain]
        given = any(source.split == "val" for source in files)
        return PackJob(
            domain=domain,
            units=[
                (path, index, source.split == "val")
                for index, source in enumerate(files)
                for path in unit_files(self.units, domain, index)
            ],
            sources=[(source.name, source.bytes, self.fingerprints[source.name]) for source in files],
            own_val=np.empty(0, np.uint64) if given else own,
            all_val=everywhere,
            seq_len=self.request.seq_len,
            dtype=self.tokenizer.dtype,
            folder=self.out / domain,
            scratch=self.work / "packing" / domain,
        )


def _refuse_other(out: Path, found: dict[str, Any], wanted: dict[str, Any], tokenizer: Tokenizer) -> None:
    names = {"seq_len": "--seq-len", "val_tokens": "--val-tokens", "sources": "raw files or --domains"}
    other = [names.get(key, key) for key in wanted if found.get(key) != wanted[key]]
    if "tokenizer" in other and is_tokenizer(
        str(found.get("tokenizer")), tokenizer.hf
    ):  # recorded by an earlier version
        other.remove("tokenizer")
    if other:
        raise UserError(f"--out {out} holds another preparation (other {', '.join(other)}); choose another folder")
