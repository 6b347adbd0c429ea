"""Datasets over prepared shards: the endless training mix, and one domain's validation samples. What they share with other
processes, shared memory and signals, is at the end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.compression import decompress
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.hashing import get_hash
from streaming.base.spanner import Spanner
from streaming.base.storage import CloudDownloader
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World
from torch.utils.data import Dataset

from mohd_train.compat import streaming_finds_one_name_a_node
from mohd_train.data.order import Int64s, interleave, walk
from mohd_train.errors import UserError
from mohd_train.utils.files import Lock
from mohd_train.utils.text import first_line, short

log = logging.getLogger(__name__)
UNPACKING = 60.0  # seconds; one shard takes about one
SHM = Path("/dev/shm")
SHM_ADVICE = "enlarge it (docker run --shm-size=8g; mount -o remount,size=8g /dev/shm), or lower data.num_workers"
START_NOTICE = 5.0  # seconds that a start waits for another one before it reports that
START_PATIENCE = 30.0  # seconds that a start waits for another one
GRACE = 60  # seconds that a data worker keeps working after SIGTERM
_held: int | None = None  # descriptor of the lock that says this run is alive


def log_failures(downloader: CloudDownloader) -> CloudDownloader:
    """The downloader, which now logs each failed attempt; streaming retries silently."""
    theirs = downloader.download

    def download(remote: str | None, local: str, timeout: float = 60) -> None:
        try:
            theirs(remote, local, timeout)
        except Exception as error:
            log.warning("downloading %s failed (%s: %s)", remote, type(error).__name__, first_line(error))
            raise

    downloader.download = download  # type: ignore[method-assign]
    return downloader


class ShardStream(Stream):
    """A Stream that several runs can unpack in the same folder at once, and that names bad shards to the user."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        log_failures(self._downloader)

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """As streaming's. Raises UserError for an index whose entries are inconsistent."""
        try:
            super().set_up_local(shards, cache_usage_per_shard)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{Path(self.local) / 'index.json'} is broken ({first_line(error)}); copy the data again"
            ) from error

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """As streaming's. Raises UserError for an index that can't be fetched or read."""
        try:
            return super().get_shards(world, allow_unsafe_types)
        except UserError:
            raise
        except Exception as error:  # each storage has exceptions of its own, and any key of the index may be missing
            raise UserError(
                f"{Path(self.local) / 'index.json'} can't be fetched or read ({type(error).__name__}: {first_line(error)}); "
                "check data.remote, or copy the data again"
            ) from error

    def _decompress_shard_part(
        self, zip_info: FileInfo, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        """Unpacks one shard under a temporary name of this process; streaming's temporary name is the same for all processes."""
        packed = Path(zip_filename).read_bytes()
        if self.validate_hash and get_hash(self.validate_hash, packed) != zip_info.hashes[self.validate_hash]:
            raise UserError(f"{zip_filename}: its content differs from its hash (corrupt); copy the shard again")
        temporary = f"{raw_filename}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            file.write(decompress(compression, packed) if compression else packed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, raw_filename)
        if not self.safe_keep_zip:
            os.remove(zip_filename)


class TokenStreams(StreamingDataset):
    """The training mix. Sample ids of an epoch come from :mod:`mohd_train.data.order`; everything else is StreamingDataset's.

    StreamingDataset's own sampling is not used because it draws each epoch independently, so that a second epoch repeats
    samples before others of the domain were seen, and because its order within an epoch depends on the number of nodes.
    """

    _fault: BaseException | None = None  # of the thread that fetches shards

    def __init__(
        self,
        streams: dict[str, Stream],
        shares: NDArray[np.float64],
        *,
        epoch_size: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        block_size: int,
        identity: str,
        vocab_size: int,
        num_canonical_nodes: int = 1,
        predownload: int | None = None,
    ) -> None:
        """Args:
        streams, shares: domains in order, and their shares [D], which sum to 1.
        epoch_size: samples in an epoch, a multiple of the global batch.
        batch_size: samples per step in this process.
        block_size: samples of a domain shuffled together.
        vocab_size: the tokenizer's.
        identity: of the prepared data; a checkpoint of other data, mix or seed is refused.
        """
        self.domain_names = list(streams)
        self._shares = shares
        self._shuffled = shuffle
        self._block = block_size
        self._vocab_size = vocab_size
        for stream, share in zip(streams.values(), shares, strict=True):
            stream.proportion = float(share)  # "relatively weighted", in StreamingDataset's terms
        with one_at_a_time():
            super().__init__(
                streams=list(streams.values()),
                epoch_size=epoch_size,
                batch_size=batch_size,
                shuffle=False,  # done in resample_streams
                shuffle_seed=seed,
                num_canonical_nodes=num_canonical_nodes,
                predownload=predownload,
            )
        key = [identity, self.domain_names, shares.tolist(), epoch_size, shuffle, seed, block_size, num_canonical_nodes]
        self._order = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[Int64s, Int64s]:
        """Sample ids of an epoch in the order they are seen [epoch_size]. The shuffle units that go with them are not used."""
        first = epoch * self.epoch_size
        domain, ordinal = interleave(self._shares, first, first + self.epoch_size)
        ids = np.empty(self.epoch_size, np.int64)
        for index, name in enumerate(self.domain_names):
            mine = np.flatnonzero(domain == index)
            if not len(mine):
                continue
            begin = self.shard_offset_per_stream[index]
            shards = self.samples_per_shard[begin : begin + self.shards_per_stream[index]]
            start, stop = int(ordinal[mine[0]]), int(ordinal[mine[-1]]) + 1
            within = walk(
                shards, start, stop, name=name, seed=self.shuffle_seed, block_size=self._block, shuffle=self._shuffled
            )
            ids[mine] = self.sample_offset_per_stream[index] + within
        return np.ones(1, np.int64), ids

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As streaming's, but after a failure nothing keeps waiting for the shard, not even the end of the process.

        Raises UserError for a shard that can't be fetched or unpacked.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:  # each storage has exceptions of its own
            self._shard_states[shard_id] = _ShardState.REMOTE
            if isinstance(error, UserError):
                raise
            shard = self.shards[shard_id]
            raise UserError(
                f"{Path(shard.dirname) / shard.file_pairs[0][0].basename}: can't be fetched or unpacked "
                f"({first_line(error)}); copy the shard again, or prepare the data again"
            ) from error

    def on_exception(self, future: Future[Any]) -> None:
        """Keeps the error of the thread that fetches shards and ends the other threads. Streaming raises it here, where only
        the executor can catch it, and prints its traceback next to the one line that the user gets."""
        fault = future.exception()
        if fault is not None:
            log.info("the thread that fetches shards ended", exc_info=fault)
            self._fault = fault
            self._event.set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples of this epoch. Streaming's own iterator ends silently if a shard can't be fetched, which the run would take
        for the end of the epoch.

        Raises UserError for a shard that can't be fetched, unpacked or read.
        """
        self._fault = None
        yield from super().__iter__()
        if self._event.is_set():
            raise self._named(self._fault)

    def _named(self, fault: BaseException | None) -> UserError:
        if isinstance(fault, UserError):
            return fault
        text = first_line(fault or "its thread ended")
        return UserError(f"a shard can't be fetched while training ({text}); check the data with mohd verify")

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """{"tokens" [T], "domain"}. Raises UserError for a shard that is gone or broken."""
        try:
            sample = super().get_item(sample_id, retry)
        except UserError:
            raise
        except Exception as error:  # whatever the bytes of a shard make its reader raise
            if self._event.is_set() and self._fault is not None:
                raise self._named(self._fault) from error
            reader = self.shards[self.spanner[sample_id][0]]
            raise UserError(
                f"{Path(reader.dirname) / reader.file_pairs[0][0].basename}: can't be read ({first_line(error)}); "
                "copy the shard again, or prepare the data again"
            ) from error
        shard, _ = self.spanner[sample_id]
        _check_ids(sample["tokens"], self._vocab_size, self.shards[shard])
        return {"tokens": sample["tokens"], "domain": int(self.stream_per_shard[shard])}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position, for a checkpoint: the epoch, and the samples seen in it over all processes.

        At the end of an epoch Composer asks with 0 samples, meaning of the next epoch. StreamingDataset would answer with the
        epoch that has just ended, and a resumed run would see it again.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"], _ = self._resume(self._parallel_rank_world, self.next_epoch)
        return state | {"order": self._order}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Resumes at a checkpoint's position.

        Raises UserError if that position belongs to another order of samples.
        """
        if obj.get("order") != self._order:
            raise UserError(
                "the checkpoint was trained on other data, or in another mix, order or global batch size, so its position in "
                "the data means nothing here; restore data.* , seed and global_train_batch_size, or set load_weights_only=true"
            )
        super().load_state_dict(obj)


class ValidationSet(Dataset[dict[str, Any]]):
    """One domain's validation samples, by index, in stored order. No shared memory, no state."""

    def __init__(self, stream: ShardStream, domain: int, vocab_size: int) -> None:
        """Args: domain: the index that the samples have; vocab_size: the tokenizer's."""
        stream.apply_default(
            {"split": None, "download_retry": 2, "download_timeout": 120, "validate_hash": None, "keep_zip": False}
        )
        self._stream = stream
        self._domain = domain
        self._vocab_size = vocab_size
        self._folder = Path(stream.local)
        self._patience = UNPACKING + stream.download_timeout * (1 + stream.download_retry)
        self._shards = stream.get_shards(World.detect(), allow_unsafe_types=False)
        self._spanner = Spanner(np.array([shard.samples for shard in self._shards], np.int64))

    def __len__(self) -> int:
        return sum(shard.samples for shard in self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"tokens" [T], "domain"}. Raises UserError for a shard that is gone or broken."""
        shard, within = self._spanner[index]
        reader = self._shards[shard]
        raw, _ = reader.file_pairs[0]
        try:
            if not (self._folder / raw.basename).exists():
                # Otherwise all processes of this machine would fetch it at once.
                busy = f"{self._folder}: {{holder}} has been unpacking shards for too long; end it, or resume it if it is stopped"
                lock = Lock(self._folder / ".lock", busy, wait=self._patience)
                try:
                    self._stream.prepare_shard(reader)
                finally:
                    lock.release()
            tokens = reader[within]["tokens"]
            _check_ids(tokens, self._vocab_size, reader)
            return {"tokens": tokens, "domain": self._domain}
        except UserError:
            raise
        except Exception as error:  # each storage and each compression has exceptions of its own
            raise UserError(
                f"{self._folder / raw.basename}: can't be fetched, unpacked or read ({first_line(error)}); copy the shard again, "
                "or prepare the data again"
            ) from error


def _check_ids(tokens: NDArray[Any], vocab_size: int, shard: Reader) -> None:
    """Raises UserError for an id beyond the vocabulary, for which a GPU only reports a failed assertion."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{Path(shard.dirname) / shard.file_pairs[0][0].basename}: token id {tokens.max()}, beyond the vocabulary of "
            f"{vocab_size}; the data is not of the tokenizer in its manifest: prepare it again"
        )


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE)


def outlive_signals(worker: int) -> None:
    """Keeps data worker number `worker` alive for a while after a signal that asks the run to stop: schedulers, a dropped
    connection and Ctrl-C reach all processes of a job, and the run still has to finish its batch and save. The worker ends with
    its run in any case."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, _end_later)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the workers too


def lock_path() -> Path:
    """In the folder of shared memory, if there is one: processes that share the memory then share the lock, in containers
    too."""
    return (SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"mohd_train.{os.getuid()}.lock"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Held while a dataset takes its name in shared memory. Streaming looks for a free name and then takes it, so of two runs
    that start together on one machine, one could fail on a name that the other took in between.

    A run on several nodes doesn't take turns: its nodes wait for each other inside, so two such runs, each first on another
    node, or a run whose "nodes" share a machine, would wait forever."""
    one_node = dist.get_world_size() <= dist.get_local_world_size()
    lock, beyond = None, 0
    if one_node and dist.get_local_rank() == 0:  # the others wait for rank 0 inside
        lock = _start_lock()
        if lock is None:  # no other process takes this name, even if the one with the lock goes on
            beyond = 1000 + os.getpid() % 900_000
    try:
        with streaming_finds_one_name_a_node(beyond):
            yield
    finally:
        if lock is not None:
            lock.release()


def _start_lock() -> Lock | None:
    """The lock of :func:`one_at_a_time`. None if another process has kept it for :data:`START_PATIENCE` seconds, or is stopped:
    one that hangs must not hold up every start of its user."""
    path = lock_path().with_suffix(".start")
    try:
        return Lock(path, "{holder}", wait=min(START_NOTICE, START_PATIENCE))
    except UserError as busy:
        holder = str(busy)
    if not _is_stopped(holder):
        print(f"warning: waiting for {holder}, which is starting on this machine ({path})", file=sys.stderr, flush=True)
        try:
            return Lock(path, "{holder}", wait=max(0.0, START_PATIENCE - START_NOTICE))
        except UserError as busy:
            holder = str(busy)
    state = "is stopped (kill -CONT resumes it)" if _is_stopped(holder) else "is still starting"
    print(f"warning: {holder} {state}; starting anyway ({path})", file=sys.stderr, flush=True)
    return None


def _is_stopped(holder: str) -> bool:
    """Whether ``process 12 on HOST`` is a process of this machine that was stopped by a signal or a debugger."""
    found = re.fullmatch(r"process (\d+) on (.*)", holder)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{found[1]}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"


def check_shared_memory(needed: int) -> None:
    """Raises UserError if /dev/shm has less than `needed` bytes free. Without the check, the first write beyond its size kills
    the process with SIGBUS."""
    if SHM.is_dir() and (free := shutil.disk_usage(SHM).free) < needed:
        raise UserError(f"{SHM} has {short(free)}B free, this run's data needs about {short(needed)}B; {SHM_ADVICE}")


def shared_memory_is_full() -> bool:
    """Whether less than 1 MiB of /dev/shm is free."""
    return SHM.is_dir() and shutil.disk_usage(SHM).free < 1 << 20


def claim_shared_memory() -> None:
    """Removes what killed runs left in shared memory, once per process, unless another run is active on this machine.

    Streaming's cleaner can't tell stale memory from live memory: it would remove that of a second run (a sweep, two users'
    tests). So every run holds a shared lock for as long as it lives, even through kill -9, and only a run that gets the lock
    exclusively cleans.
    """
    global _held
    if _held is not None:
        return
    alone = 1
    if dist.get_local_rank() == 0:
        _held = os.open(lock_path(), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = 0
            log.info("another run is active on this machine; its shared memory is left alone")
    else:
        _held = -1
    if min(dist.all_gather_object(alone)):  # the cleaner waits for all processes, so all of them call it or none
        clean_stale_shared_memory()
    if dist.get_local_rank() == 0:
        fcntl.flock(_held, fcntl.LOCK_SH)
