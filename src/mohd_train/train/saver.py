"""Composer's checkpoint saver, with checkpoints that are whole or not there, and some that are kept for good."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer import callbacks
from composer.core import State, Time
from composer.loggers import Logger
from composer.utils import checkpoint

from mohd_train.errors import UserError
from mohd_train.train.checkpoint import NAME

log = logging.getLogger(__name__)
ATTEMPTS = 3
WAIT = 2.0  # seconds before the second attempt, twice that before the third
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def leftovers(folder: Path) -> list[Path]:
    """Halves of checkpoints that a kill cut short."""
    return sorted(folder.glob(".ep*-ba*-rank*.pt.tmp"))


def _cause(error: BaseException) -> OSError | None:
    """The OSError behind what torch.save raised: its zip writer hides it behind a RuntimeError of its own."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


def write_whole(state_dict: dict[str, Any], filename: str) -> None:
    """Writes a checkpoint under a temporary name, flushed to disk, and then renames it. Tries again where it may help.

    Raises:
        UserError: the disk is full, or it can't be written after :data:`ATTEMPTS` attempts. Nothing is left of the attempt.
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
            log.warning("saving %s failed (%s); trying again", path, cause.strerror)
            time.sleep(WAIT * attempt)


def _failure(path: Path, cause: OSError) -> str:
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(path.parent).free / 1e9:.1f} GB free"
    return (
        f"{path} can't be saved ({cause.strerror}{free}); make room (save_num_checkpoints_to_keep keeps the last K alone) or "
        "mend the folder, then go on from the last whole checkpoint with autoresume=true"
    )


@contextlib.contextmanager
def _whole_files() -> Iterator[None]:
    """Composer writes straight to the final name and has no hook for it."""
    theirs = checkpoint._write_checkpoint_file
    checkpoint._write_checkpoint_file = write_whole
    try:
        yield
    finally:
        checkpoint._write_checkpoint_file = theirs


class CheckpointSaver(callbacks.CheckpointSaver):
    """See :func:`write_whole`; the class keeps Composer's name, under which its state stands in checkpoints.

    Args:
        keep_every: such as ``"10000ba"``: checkpoints of these batches are never removed, and don't count to the last K.
        arguments: Composer's.
    """

    def __init__(self, *, keep_every: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.keep_every = int(Time.from_timestring(keep_every).value) if keep_every else None
        self.newest: str | None = None

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        with _whole_files():
            super()._save_checkpoint(state, logger)
        if self.saved_checkpoints:
            self.newest = self.saved_checkpoints[-1]

    def save_now(self, state: State, logger: Logger) -> None:
        """Saves this batch, unless it is saved already."""
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)

    def is_kept(self, path: str) -> bool:
        """Whether ``keep_every`` covers it."""
        match = NAME.fullmatch(Path(path).name)
        return self.keep_every is not None and match is not None and int(match[1]) % self.keep_every == 0

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        rotating = [path for path in self.saved_checkpoints if not self.is_kept(path)]
        excess = len(rotating) - self.num_checkpoints_to_keep
        for path in rotating[: max(excess, 0)]:
            Path(path).unlink(missing_ok=True)
            self.saved_checkpoints.remove(path)
