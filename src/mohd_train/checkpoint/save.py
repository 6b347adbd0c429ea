"""Saving: Composer's checkpoint saver, made atomic; some checkpoints are kept for good."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import callbacks
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.checkpoint.api import CheckpointException

from mohd_train import compat
from mohd_train.checkpoint.read import open_native
from mohd_train.errors import UserError, causes
from mohd_train.run_folder.paths import checkpoint_batch
from mohd_train.utils.distributed import on_rank_zero

log = logging.getLogger(__name__)
ATTEMPTS = 3
WAIT = 2.0  # seconds before the second attempt, doubled before the third
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def leftovers(folder: Path) -> list[Path]:
    """Partial checkpoints that a kill left behind, in saving or in removing."""
    return sorted(folder.glob(".ep*-ba*.tmp"))


def remove(path: Path) -> None:
    """Removes a file, or a sharded checkpoint, which is hidden first: a partial one must never have its name."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith("."):
            path = path.replace(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cause(error: BaseException) -> OSError | None:
    """The OSError behind what torch.save raised: its zip writer wraps it in a RuntimeError."""
    return next((one for one in causes(error) if isinstance(one, OSError)), None)


def write_checkpoint(state_dict: dict[str, Any], filename: str) -> None:
    """Writes a checkpoint under a temporary name, flushes it to disk, and then renames it. Retries where it may help.

    Raises:
        UserError: the disk is full, or it can't be written after :data:`ATTEMPTS` attempts. Nothing is left of the
            attempt.
    """
    path = Path(filename)
    temporary = path.with_name(f".{path.name}.tmp")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            cause = _cause(error)
            if cause is None:
                raise
            if cause.errno in FULL or attempt == ATTEMPTS:
                raise UserError(_failure(path, cause)) from error
            log.warning("saving %s failed (%s); retrying", path, cause.strerror)
            time.sleep(WAIT * attempt)


def _failure(path: Path, cause: OSError) -> str:
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(path.parent).free / 1e9:.1f} GB free"
    return (
        f"{path} can't be saved ({cause.strerror}{free}); make room (save_num_checkpoints_to_keep keeps only the last K) or "
        "mend the folder, then resume from the last complete checkpoint with autoresume=true"
    )


def save_sharded(save: Callable[[str], str | None], filename: str) -> str | None:
    """Makes every rank write its part into a folder with a temporary name, which is then renamed.

    Args:
        save: writes a sharded checkpoint, given this rank's file in it.
        filename: the file in the folder to be.

    Raises:
        UserError: on every rank, if one can't write. Nothing of the attempt is left under the folder's name.
    """
    folder = Path(filename).parent
    temporary = folder.with_name(f".{folder.name}.tmp")

    def clear() -> None:
        if temporary.exists():
            shutil.rmtree(temporary)

    def rename() -> None:
        if folder.exists():  # broken, or about to be rewritten identically
            remove_beside = folder.replace(folder.with_name(f".{folder.name}.old.tmp"))
            temporary.replace(folder)
            shutil.rmtree(remove_beside)
        else:
            temporary.replace(folder)

    try:
        on_rank_zero(lambda: _named(folder, clear))
        try:
            saved = save(str(temporary / Path(filename).name))
        except CheckpointException as error:  # the same one on every rank
            found = [_cause(failure) for failure, _ in error.failures.values()]
            cause = next((one for one in found if one is not None), None)
            if cause is None:
                raise
            raise UserError(_failure(folder, cause)) from error
        dist.barrier()  # Composer checks for each rank's file again
        on_rank_zero(lambda: _named(folder, rename))
    finally:
        if dist.get_global_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return filename if saved else None


def _named(folder: Path, work: Callable[[], None]) -> None:
    """Runs ``work``; an OSError becomes one line that names the checkpoint."""
    try:
        work()
    except OSError as error:
        raise UserError(_failure(folder, error)) from error


def nonfinite(state: State) -> str | None:
    """The first parameter or optimizer state that holds NaN or infinity on any rank; None if all are finite.

    To be called by every rank.
    """
    named = {name: parameter for name, parameter in state.model.named_parameters() if parameter.numel()}
    tensors = [(name, parameter.detach()) for name, parameter in named.items()]
    for optimizer in state.optimizers:
        for name, parameter in named.items():
            moments = optimizer.state.get(parameter, {})
            tensors += [
                (f"optimizer state {key} of {name}", value) for key, value in moments.items() if _is_floating(value)
            ]
    found = None
    if tensors:
        bad = torch.stack([~torch.isfinite(value).all().to(tensors[0][1].device) for _, value in tensors])
        first = int(bad.to(torch.int8).argmax())  # waits for the device only once
        found = tensors[first][0] if bad[first] else None
    names = [name for name in dist.all_gather_object(found) if name is not None]
    return names[0] if names else None


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0


class RunMetadata(Callback):
    """Puts what export and evaluation need into every checkpoint, at ``state/callbacks/RunMetadata``.

    A callback's state is Composer's place for it: ``state/metadata`` and ``state/integrations`` take no entries of
    ours.

    Args:
        values: ``plan`` (``ModelPlan.to_dict``), ``run_name``, ``tokenizer_sha256``, ``seq_len``, ``version``: plain
            data.
        text: for sharded checkpoints, as JSON under ``json``: there each value would be an entry of its own, and a key
            that the next session's config adds could not be loaded.
    """

    def __init__(self, values: dict[str, Any], *, text: bool = False) -> None:
        self.values = values
        self.text = text

    def state_dict(self) -> dict[str, Any]:
        """The values, as they are."""
        return {"json": json.dumps(self.values)} if self.text else dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing: :func:`mohd_train.checkpoint.resume.check_checkpoint` compares the two before the
        load."""


def checkpoint_of(saved: str) -> Path:
    """The checkpoint, file or folder, that Composer knows by what this rank has written of it."""
    return Path(saved).parent if saved.endswith(".distcp") else Path(saved)


class CheckpointSaver(callbacks.CheckpointSaver):
    """See :func:`write_checkpoint`; the class keeps Composer's name, under which its state stands in checkpoints.

    Args:
        keep_every: such as ``"10000ba"``: checkpoints of these batches are never removed, and don't count to the last K.
        arguments: Composer's.
    """

    def __init__(self, *, keep_every: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.keep_every = int(Time.from_timestring(keep_every).value) if keep_every else None
        self.newest: str | None = None

    def after_load(self, state: State, logger: Logger) -> None:
        """Raises UserError if the loaded checkpoint holds non-finite numbers."""
        name = nonfinite(state)
        if name is not None:
            raise UserError(
                f"the loaded checkpoint is unusable: {name} holds NaN or infinity; remove it, and the run resumes "
                "from the one before"
            )

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        name = nonfinite(state)
        if name is not None:
            raise UserError(
                f"batch {state.timestamp.batch.value} is not saved: {name} holds NaN or infinity. The last good checkpoint is "
                f"{self.newest or 'none yet'}: resume from it with autoresume=true, or start another run with a lower optimizer.lr"
            )
        with compat.composer_saves_atomically(write_checkpoint, save_sharded):
            super()._save_checkpoint(state, logger)
        if self.saved_checkpoints:
            self.newest = str(checkpoint_of(self.saved_checkpoints[-1]))

    def save_now(self, state: State, logger: Logger) -> None:
        """Saves this batch, unless it is already saved."""
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)

    def is_kept(self, path: str) -> bool:
        """Whether ``keep_every`` covers it."""
        batch = checkpoint_batch(checkpoint_of(path).name)
        return self.keep_every is not None and batch is not None and batch % self.keep_every == 0

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        rotating = [path for path in self.saved_checkpoints if not self.is_kept(path)]
        excess = len(rotating) - self.num_checkpoints_to_keep
        if excess > 0 and dist.get_global_rank() == 0:
            # The new checkpoint is read back before the one it replaces is removed.
            open_native(checkpoint_of(self.saved_checkpoints[-1])).verify()
        for path in rotating[: max(excess, 0)]:
            if dist.get_global_rank() == 0:  # of a sharded checkpoint every rank knows its part
                remove(checkpoint_of(path))
            self.saved_checkpoints.remove(path)
