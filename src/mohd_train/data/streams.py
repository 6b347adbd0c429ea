"""Datasets over prepared shards: the endless training mix, and one domain's validation samples."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.compression import decompress
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.hashing import get_hash
from streaming.base.spanner import Spanner
from streaming.base.world import World
from torch.utils.data import Dataset

from mohd_train.data.order import Int64s, interleave, walk
from mohd_train.data.remote import tell_failures
from mohd_train.data.shared_memory import one_at_a_time
from mohd_train.errors import UserError

log = logging.getLogger(__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class ShardStream(Stream):
    """A Stream that several runs may unpack in the same folder at once, and whose bad shards are named to the user."""

    def __init__(self, **arguments: Any) -> None:
        """Args: arguments: Stream's."""
        super().__init__(**arguments)
        tell_failures(self._downloader)

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """As streaming's. Raises UserError for an index whose entries don't fit together."""
        try:
            super().set_up_local(shards, cache_usage_per_shard)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{Path(self.local) / 'index.json'} is broken ({_first_line(error)}); copy the data again"
            ) from error

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """As streaming's. Raises UserError for an index that can't be fetched or read."""
        try:
            return super().get_shards(world, allow_unsafe_types)
        except UserError:
            raise
        except Exception as error:  # each storage has exceptions of its own, and any key of the index may be missing
            raise UserError(
                f"{Path(self.local) / 'index.json'} can't be fetched or read ({type(error).__name__}: {_first_line(error)}); "
                "check data.remote, or copy the data again"
            ) from error

    def _decompress_shard_part(
        self, zip_info: FileInfo, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        """Unpacks one shard under a name of this process's own; streaming's is shared by all and can be pulled away."""
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
    """The training mix. Sample ids of an epoch come from :mod:`mohd_train.data.order`; the rest is StreamingDataset's.

    Why not StreamingDataset's own sampling: it draws each epoch anew, so a second epoch repeats samples while others of the
    domain were never seen, and its order within an epoch depends on the number of nodes.
    """

    _fault: BaseException | None = None  # what the thread that fetches shards ran into

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
        num_canonical_nodes: int = 1,
        predownload: int | None = None,
    ) -> None:
        """Args:
        streams, shares: domains in order, and their shares [D] summing to 1.
        epoch_size: samples of an epoch, a multiple of the global batch.
        batch_size: samples a step in this process.
        block_size: samples of a domain shuffled together.
        identity: of the prepared data; a checkpoint of other data, mix or seed is refused.
        """
        self.domain_names = list(streams)
        self._shares = shares
        self._shuffled = shuffle
        self._block = block_size
        for stream, share in zip(streams.values(), shares, strict=True):
            stream.proportion = float(share)  # what StreamingDataset calls a relatively weighted stream
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
        """Sample ids of an epoch in the order they are seen [epoch_size]; the shuffle units beside them are not used."""
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
        """As streaming's; but where it fails, nobody is left waiting for the shard for ever, the end of the process included.

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
                f"({_first_line(error)}); copy the shard again, or prepare the data again"
            ) from error

    def on_exception(self, future: Future[Any]) -> None:
        """Keeps what went wrong in the thread that fetches shards, and ends the others. Streaming's raises it here, where nobody
        but the executor catches it, and prints its traceback beside the one line that the user gets."""
        fault = future.exception()
        if fault is not None:
            log.info("the thread that fetches shards ended", exc_info=fault)
            self._fault = fault
            self._event.set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples of this epoch. Streaming's own iterator ends in silence when a shard can't be fetched, and the run would take
        that for the end of the epoch.

        Raises UserError for a shard that can't be fetched, unpacked or read.
        """
        self._fault = None
        yield from super().__iter__()
        if self._event.is_set():
            raise self._named(self._fault)

    def _named(self, fault: BaseException | None) -> UserError:
        if isinstance(fault, UserError):
            return fault
        text = str(fault or "its thread ended").splitlines()[0]
        return UserError(f"a shard can't be fetched while training ({text}); check the data with data_prep/verify.py")

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
                f"{Path(reader.dirname) / reader.file_pairs[0][0].basename}: can't be read ({_first_line(error)}); "
                "copy the shard again, or prepare the data again"
            ) from error
        shard, _ = self.spanner[sample_id]
        return {"tokens": sample["tokens"], "domain": int(self.stream_per_shard[shard])}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position, for a checkpoint: epoch and samples seen in it over all processes.

        Composer asks at the end of an epoch with 0 samples, meaning the next one; StreamingDataset would say the one just
        ended, and a resumed run would see it again.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"], _ = self._resume(self._parallel_rank_world, self.next_epoch)
        return state | {"order": self._order}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Goes on at a checkpoint's position.

        Raises UserError when the position is one in another order of samples.
        """
        if obj.get("order") != self._order:
            raise UserError(
                "the checkpoint was trained on other data, or in another mix, order or global batch size, so its position in "
                "the data means nothing here; restore data.* , seed and global_train_batch_size, or set load_weights_only=true"
            )
        super().load_state_dict(obj)


class ValidationSet(Dataset[dict[str, Any]]):
    """One domain's validation samples, by index, in the order they are stored. No shared memory, no state."""

    def __init__(self, stream: ShardStream, domain: int) -> None:
        """Args: domain: index that the samples carry."""
        stream.apply_default(
            {"split": None, "download_retry": 2, "download_timeout": 120, "validate_hash": None, "keep_zip": False}
        )
        self._stream = stream
        self._domain = domain
        self._folder = Path(stream.local)
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
                with FileLock(self._folder / ".lock"):  # processes of this machine would fetch it all at once
                    self._stream.prepare_shard(reader)
            return {"tokens": reader[within]["tokens"], "domain": self._domain}
        except UserError:
            raise
        except Exception as error:  # each storage and each packing has exceptions of its own
            raise UserError(
                f"{self._folder / raw.basename}: can't be fetched, unpacked or read ({_first_line(error)}); copy the shard again, "
                "or prepare the data again"
            ) from error
