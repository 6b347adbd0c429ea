"""What a path is, and what a native checkpoint holds: metadata and parameters, read without running anything in it.

Three kinds of path are checkpoints:

- ``file``: one file that Composer wrote, ``ep0-ba100-rank0.pt``;
- ``sharded``: a folder that torch.distributed.checkpoint wrote, one part for each rank, ``ep0-ba100/``;
- ``hf``: a Hugging Face folder, ``config.json`` beside weights (``*.safetensors`` or ``*.bin``).

Each may be named by a link: Composer's ``latest-rank0.pt`` is a symbolic link to a file or, for a sharded run, to a
folder; on object storage, and in a folder copied from there, it is a text file, ``latest-rank0.pt.symlink``, that holds
the name of the checkpoint.
"""

from __future__ import annotations

import datetime
import functools
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion

from mohd_train.checkpoint.identity import fingerprint
from mohd_train.checkpoint.sharded import METADATA_FILE, SafeReader, ShardedError, is_sharded, read_sharded
from mohd_train.checkpoint.verify import verify_file, verify_sharded
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import CHECKPOINTS, LATEST, TOKENIZER
from mohd_train.storage import here, is_remote
from mohd_train.utils.text import first_line

# All that a Composer checkpoint holds besides tensors and plain containers: RNG state, versions, times. torch refuses
# any other class, so a file that would run code on loading ends here, before Composer's own (trusting) load ever sees
# it.
SAFE: list[Any] = [
    TorchVersion,
    datetime.timedelta,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
]
METADATA = "RunMetadata"  # the callback whose state carries it
PREFIX = "model."  # of the transformer's parameters in the trainer's state
LINK_SUFFIX = ".symlink"  # of Composer's links on object storage
LONGEST_LINK = 4096  # bytes
EXAMPLE = f"a checkpoint, such as {CHECKPOINTS}/{LATEST}"

Kind = Literal["file", "sharded", "hf"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete, as far as can be known without reading its tensors.

    Attributes:
        path: the file or folder itself, never a link; a local copy where the checkpoint lies on object storage.
        source: its name in results and messages: its address on object storage, else ``path``.
        plan: the architecture of a native checkpoint. None for a Hugging Face folder, whose ``config.json`` describes it.
        metadata: of a native checkpoint what the trainer put there (plan, run_name, tokenizer_sha256, seq_len, config,
            version); of a Hugging Face folder its ``config.json``.
        files: the files that decide the model's function, in a fixed order.
    """

    path: Path
    kind: Kind
    source: str
    plan: ModelPlan | None
    metadata: dict[str, Any]
    files: tuple[Path, ...]
    _read: Callable[[bool], Tensors] = field(repr=False, compare=False)
    _verify: Callable[[], None] = field(repr=False, compare=False, default=lambda: None)

    def tensors(self, *, meta: bool = False) -> Tensors:
        """The parameters: under the transformer's own names, or under those of a Hugging Face folder's files.

        Those of a file are memory-mapped; a sharded checkpoint's are assembled in memory.

        Args:
            meta: on the meta device, for names, shapes and types.

        Raises:
            UserError: they can't be read.
        """
        return self._read(meta)

    def verify(self) -> Checkpoint:
        """This checkpoint, once all of it has been read and compared with the checksums it carries (safetensors has
        none).

        Raises:
            UserError: its bytes are not those that were written; the message names the entry.
        """
        self._verify()
        return self

    @property
    def is_native(self) -> bool:
        """Whether this project's trainer wrote it."""
        return self.kind != "hf"

    @property
    def run_folder(self) -> Path:
        """The run that a native checkpoint belongs to: ``RUN/checkpoints/CHECKPOINT``."""
        return self.path.parent.parent

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer is: ``RUN/tokenizer``, or beside it if it was saved elsewhere; or the Hugging Face folder
        itself."""
        if not self.is_native:
            return self.path
        beside = self.path.parent / TOKENIZER
        return beside if beside.is_dir() else self.run_folder / TOKENIZER

    @property
    def tokenizer_sha256(self) -> str | None:
        """The tokenizer that the model was trained with, where the checkpoint says so: all but Hugging Face folders of
        others."""
        recorded = self.metadata.get("tokenizer_sha256")
        return recorded if isinstance(recorded, str) else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies a checkpoint, wherever it is, by every byte of :attr:`files`: see :func:`fingerprint`."""
        return fingerprint(self.files, cached=self.source == str(self.path))


def exists(path: Path | str) -> bool:
    """Whether ``path`` names anything here, even a broken link; an address on object storage always does."""
    path = path if is_remote(path) else Path(path)
    return isinstance(path, str) or path.exists() or path.is_symlink() or _text_link(path).is_file()


def open(path: Path | str) -> Checkpoint:
    """Finds out what ``path`` is, and reads its metadata. A checkpoint on object storage is downloaded.

    Raises:
        UserError: nothing is there, it is none of the three kinds, broken, half-written, or holds more than plain data.
    """
    found = resolve(here(path))
    source = str(path) if is_remote(path) else str(found)
    return {"file": _open_file, "sharded": _open_sharded, "hf": _open_hf}[kind_of(found)](found, source)


def open_native(path: Path | str) -> Checkpoint:
    """As :func:`open`, for a checkpoint that the trainer wrote. Raises UserError for a Hugging Face
    folder."""
    found = open(path)
    if not found.is_native:
        raise UserError(f"{path} is a Hugging Face folder; give {EXAMPLE}")
    return found


def resolve(path: Path) -> Path:
    """The file or folder that ``path`` stands for, links followed; a path that does not exist is returned unchanged.

    Raises:
        UserError: a link that points nowhere.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} points to {path.readlink()}, which is not there; give another checkpoint")
    link = path if path.exists() else _text_link(path)
    name = _pointed_name(link)
    if name is None:
        return path.resolve()
    if not name or not (link.parent / name).exists():
        raise UserError(f"{link} points to {name or 'no checkpoint'}, which is not there; give another checkpoint")
    return (link.parent / name).resolve()


def kind_of(path: Path) -> Kind:
    """What ``path`` is, links followed. Reads no more than it must, so that a broken checkpoint still has a kind.

    Raises:
        UserError: nothing is there, or none of the three.
    """
    path = resolve(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give {EXAMPLE}, or a Hugging Face folder")
    if is_sharded(path):
        return "sharded"
    if path.is_dir():
        if (path / "config.json").is_file():
            return "hf"
        raise UserError(f"{path} is a folder without config.json, so not a Hugging Face one; give that, or {EXAMPLE}")
    if path.suffix == ".pt" or zipfile.is_zipfile(path):
        return "file"
    raise UserError(f"{path} is not a checkpoint of a known kind; give {EXAMPLE}, or a Hugging Face folder")


def _text_link(path: Path) -> Path:
    return path if path.suffix == LINK_SUFFIX else path.with_name(path.name + LINK_SUFFIX)


def _pointed_name(link: Path) -> str | None:
    """The name in a text link's folder that it stands for; None where ``link`` is no text link.

    A symbolic link becomes a text file of its content where an archive or a file system knows no links: then the name
    of a file says nothing, and only one that names a neighbor counts.
    """
    if not link.is_file() or link.stat().st_size > LONGEST_LINK:
        return None
    try:
        name = link.read_text(encoding="utf-8").strip().rpartition("/")[2]
    except (OSError, UnicodeDecodeError):
        return None
    if link.suffix == LINK_SUFFIX:
        return name
    known = name.isprintable() and name not in ("", ".", "..", link.name) and (link.parent / name).exists()
    return name if known else None


def _open_file(path: Path, source: str) -> Checkpoint:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is broken or half-written (no zip directory at its end); use an earlier checkpoint")
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        metadata, state = content["state"]["callbacks"][METADATA], content["state"]["model"]
        weights = {name.removeprefix(PREFIX): weight for name, weight in state.items()}
    except Exception as error:  # broken bytes may raise anything
        verify_file(path)
        if isinstance(error, pickle.UnpicklingError):
            raise _refused(path, error) from None
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            raise _foreign(path) from None
        raise _unreadable(path, error) from None

    def read(meta: bool) -> Tensors:
        return {name: weight.to("meta") for name, weight in weights.items()} if meta else dict(weights)

    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise _foreign(path)
    return Checkpoint(path, "file", source, _plan(path, metadata), metadata, (path,), read, lambda: verify_file(path))


def _open_sharded(path: Path, source: str) -> Checkpoint:
    def read(meta: bool) -> Tensors:
        return _read_sharded(path, meta)[1]

    metadata, _ = _read_sharded(path, meta=True)
    files = (path / METADATA_FILE, *sorted(path.glob("*.distcp")))

    def verify() -> None:
        verify_sharded(path, SafeReader(path).read_metadata().storage_data)

    return Checkpoint(path, "sharded", source, _plan(path, metadata), metadata, files, read, verify)


def _read_sharded(path: Path, meta: bool) -> tuple[dict[str, Any], Tensors]:
    try:
        with torch.serialization.safe_globals(SAFE):
            return read_sharded(path, METADATA, meta=meta, key=lambda name: name.removeprefix(PREFIX))
    except (KeyError, TypeError, IndexError):
        raise _foreign(path) from None
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except ShardedError as error:
        raise UserError(f"{path} is broken or half-written ({error}); use an earlier checkpoint") from None
    except (RuntimeError, EOFError, OSError, AttributeError, ImportError, ValueError) as error:
        raise _unreadable(path, error) from None


def _open_hf(path: Path, source: str) -> Checkpoint:
    config = path / "config.json"
    try:
        metadata = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config} is not valid JSON ({error}); copy the folder again") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{config} is not a model's configuration; copy the folder again")
    weights = [file for suffix in ("safetensors", "bin") for file in sorted(path.glob(f"*.{suffix}"))]
    if not weights:
        raise UserError(f"{path} has a config.json but no weights (*.safetensors or *.bin); the export is incomplete")
    indexes = sorted(path.glob("*.index.json"))  # which file holds which weight
    return Checkpoint(
        path, "hf", source, None, metadata, (config, *indexes, *weights), functools.partial(_read_hf, weights)
    )


def _read_hf(files: list[Path], meta: bool) -> Tensors:
    tensors: Tensors = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (SafetensorError, RuntimeError, EOFError, OSError, TypeError, pickle.UnpicklingError) as error:
            raise _unreadable(file, error) from None
    return {name: tensor.to("meta") for name, tensor in tensors.items()} if meta else tensors


def _plan(path: Path, metadata: object) -> ModelPlan:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("plan"), dict):
        raise _foreign(path)
    try:
        return ModelPlan.from_dict(metadata["plan"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} is not a checkpoint of this project: it lacks state/model or state/callbacks/{METADATA}")


def _refused(path: Path, error: pickle.UnpicklingError) -> UserError:
    lines = str(error).splitlines()  # of torch's long message, the one that names the class
    reason = next((line.strip() for line in lines if "global" in line.lower()), (lines or ["unreadable"])[0])
    return UserError(f"{path} is refused: it holds more than tensors and plain data ({reason})")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read ({first_line(error)}); use an earlier checkpoint")
