"""Reading a sharded checkpoint (a folder of torch.distributed.checkpoint, DCP) without running anything it holds.

DCP's ``.metadata`` is a pickle, and what isn't a tensor is a pickle within the shards; torch trusts both.
Here the first is read by an unpickler that knows only DCP's own classes, the others by torch's restricted one. A
folder that passes :func:`check_sharded` holds nothing that would run code in torch's own load.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

METADATA_FILE = ".metadata"
SHARD = re.compile(r"__\d+_\d+\.distcp")
CLASSES: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__name__): cls
    for cls in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PosixPath,
}


class ShardedError(ValueError):
    """What is wrong with the folder."""


class CodeError(pickle.UnpicklingError):
    """The metadata asks for a class or function that isn't DCP's."""


class _Unpickler(pickle.Unpickler):
    """Accepts :data:`CLASSES` and torch's data types."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CodeError(f"global {module}.{name} in {METADATA_FILE}")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, with that unpickler; tensors it reads with ``weights_only=True`` itself."""

    def read_metadata(self) -> metadata.Metadata:
        """Raises CodeError for a class that isn't DCP's, ShardedError for what is no metadata."""
        with (Path(self.path) / METADATA_FILE).open("rb") as file:
            try:
                found = _Unpickler(file).load()
            except CodeError:
                raise
            except Exception as error:  # broken bytes may raise anything
                raise ShardedError(f"{METADATA_FILE}: {error}") from error
        if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
            raise ShardedError(f"{METADATA_FILE} is none of torch.distributed.checkpoint")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a folder that DCP may have written."""
    return path.is_dir() and ((path / METADATA_FILE).exists() or any(path.glob("*.distcp")))


def _check_files(folder: Path, found: metadata.Metadata) -> None:
    """Checks that every part that the metadata names is there, in a shard of this folder."""
    ends: dict[str, int] = {}
    for info in found.storage_data.values():
        if not SHARD.fullmatch(info.relative_path) or info.transform_descriptors:
            raise ShardedError(f"{METADATA_FILE} names {info.relative_path!r}, which is no shard")
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < end:
            raise ShardedError(f"{name} has {size} bytes of at least {end}")
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, metadata.BytesStorageMetadata):
            chunks = [metadata.MetadataIndex(name)]
        else:
            chunks = [metadata.MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise ShardedError(f"{name} is not covered by its parts")
        if any(index not in found.storage_data for index in chunks):
            raise ShardedError(f"{name} is in no shard")


def _check_optimizer(found: metadata.Metadata) -> None:
    """Checks that every parameter has the same moments, if there are any: loading would leave missing ones at zero."""
    moments: dict[str, set[str]] = {}
    parameters = set()
    for path in found.planner_data.values():
        if path[:2] == ("state", "model"):
            parameters.add(path[2])
        elif path[:2] == ("state", "optimizers") and path[3] == "state":
            moments.setdefault(path[4], set()).add(path[5])
    if moments and (moments.keys() != parameters or len({frozenset(names) for names in moments.values()}) > 1):
        raise ShardedError("the optimizer's state lacks parameters")


def _plain(folder: Path, found: metadata.Metadata) -> dict[str, Any]:
    """Everything that isn't a tensor, by its flat name; ``torch.serialization.safe_globals`` says what may be in it."""
    values: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        opened = functools.cache(lambda name: stack.enter_context((folder / name).open("rb")))
        for name, entry in found.state_dict_metadata.items():
            if isinstance(entry, metadata.BytesStorageMetadata):
                info = found.storage_data[metadata.MetadataIndex(name)]
                file = opened(info.relative_path)
                file.seek(info.offset)
                values[name] = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
    return values


def check_sharded(folder: Path) -> tuple[metadata.Metadata, dict[str, Any]]:
    """Reads everything but the tensors, and makes sure that those are there.

    To be called within ``torch.serialization.safe_globals``.

    Raises:
        ShardedError: half-written, or something is missing. UnpicklingError: it holds more than tensors and plain data.
    """
    if not (folder / METADATA_FILE).is_file():
        raise ShardedError(f"no {METADATA_FILE}, which is written last")
    found = SafeReader(folder).read_metadata()
    _check_files(folder, found)
    _check_optimizer(found)
    return found, _plain(folder, found)


def read_sharded(
    folder: Path, callback: str, *, meta: bool, key: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of a callback that is stored as JSON, and the full parameters.

    Args:
        callback: its name.
        meta: parameters on the meta device: shapes and types alone.
        key: a parameter's name in what is returned, from that in the checkpoint.

    Raises:
        As :func:`check_sharded`; KeyError where the callback or the model isn't there.
    """
    found, plain = check_sharded(folder)
    values: dict[str, Any] = json.loads(plain[f"state.callbacks.{callback}.json"])
    entries = {
        path[2]: (name, found.state_dict_metadata[name])
        for name, path in found.planner_data.items()
        if path[:2] == ("state", "model")
    }
    if not entries:
        raise KeyError("model")
    with torch.device("meta" if meta else "cpu"):
        tensors = {
            path: torch.empty(entry.size, dtype=entry.properties.dtype)
            for path, (_, entry) in entries.items()
            if isinstance(entry, metadata.TensorStorageMetadata)
        }
    if not meta:
        flat = {entries[path][0]: tensor for path, tensor in tensors.items()}
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(flat, storage_reader=SafeReader(folder), planner=planner, no_dist=True)
    return values, {key(path): tensor for path, tensor in tensors.items()}
