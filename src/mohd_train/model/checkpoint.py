"""Reading a native checkpoint, a file or a sharded folder: what it says of itself and its parameters, without running anything it
holds."""

from __future__ import annotations

import datetime
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from mohd_train.errors import UserError
from mohd_train.model.sharded import ShardedError, is_sharded, read_sharded

# All that a Composer checkpoint holds beside tensors and plain containers: RNG state, versions, times. torch refuses any other
# class, so a file that would run code on loading ends here, before Composer's own (trusting) load ever sees it.
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


def _reason(error: Exception) -> str:
    """The line of torch's long message that names the class."""
    return next(
        (line.strip() for line in str(error).splitlines() if "global" in line.lower()), str(error).splitlines()[0]
    )


def _refused(path: Path, error: pickle.UnpicklingError) -> UserError:
    return UserError(f"{path} is refused: it holds more than tensors and plain data ({_reason(error)})")


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} is no checkpoint of this project: it lacks state/model or state/callbacks/{METADATA}")


def _read_folder(path: Path, meta: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A sharded checkpoint. Raises as :func:`read_checkpoint`."""
    if not is_sharded(path):
        raise UserError(f"{path} is a folder; give a checkpoint, such as checkpoints/latest-rank0.pt")
    try:
        with torch.serialization.safe_globals(SAFE):
            return read_sharded(path, METADATA, meta=meta, key=lambda name: name.removeprefix(PREFIX))
    except (KeyError, TypeError, IndexError):
        raise _foreign(path) from None
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except ShardedError as error:
        raise UserError(f"{path} is broken or half-written ({error}); take an earlier checkpoint") from None
    except (RuntimeError, EOFError, OSError, AttributeError, ImportError, ValueError) as error:
        raise UserError(f"{path} can't be read ({str(error).splitlines()[0]}); take an earlier checkpoint") from None


def read_checkpoint(path: Path, *, meta: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and parameters (under the transformer's own names) of a Composer checkpoint of this project.

    Args:
        path: a file, whose parameters are memory-mapped, or the folder of a sharded checkpoint, whose are put together in memory.
        meta: a folder's parameters on the meta device: for who asks for names and shapes.

    Raises:
        UserError: nothing there, a broken or half-written checkpoint, one that holds code, or one of something else.
    """
    if path.is_dir():
        return _read_folder(path, meta)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a checkpoint file, such as checkpoints/latest-rank0.pt")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is broken or half-written (no zip directory at its end); take an earlier checkpoint")
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = content["state"]
        metadata, weights = state["callbacks"][METADATA], state["model"]
    except (KeyError, TypeError):
        raise _foreign(path) from None
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except (RuntimeError, EOFError, OSError, AttributeError, ImportError) as error:
        raise UserError(f"{path} can't be read ({str(error).splitlines()[0]}); take an earlier checkpoint") from None
    return metadata, {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
