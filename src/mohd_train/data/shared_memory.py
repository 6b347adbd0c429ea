"""Shared memory that a killed run leaves behind. It is cleared at start, but never under a run that is alive."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from composer.utils import dist
from streaming.base.util import clean_stale_shared_memory

from mohd_train.compat import streaming_finds_one_name_a_node

log = logging.getLogger(__name__)
_held: int | None = None


def lock_path() -> Path:
    """Beside the shared memory itself, where there is such a folder: what sees the one sees the other, in containers too."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"mohd_train.{os.getuid()}.lock"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Held while a data set takes its name in shared memory. streaming looks for a free name and then takes it: of two runs
    that start together on one machine, one would fail on a name the other took in between.

    A run of several nodes takes no turn: inside, its nodes wait for each other, so that two such runs, each first on another
    node, or a run whose "nodes" share a machine, would wait for ever."""
    one_node = dist.get_world_size() <= dist.get_local_world_size()
    with contextlib.ExitStack() as stack:
        if one_node and dist.get_local_rank() == 0:  # the others wait for rank 0 inside
            lock = stack.enter_context(open(lock_path().with_suffix(".start"), "ab", opener=_mine))
            fcntl.flock(lock, fcntl.LOCK_EX)
        stack.enter_context(streaming_finds_one_name_a_node())
        yield


def _mine(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def claim_shared_memory() -> None:
    """Clears what killed runs left in shared memory, once a process, unless another run is at work on this machine.

    streaming's cleaner can't tell stale from live: it would take the memory of a second run (a sweep, two users' tests). So
    every run holds a shared lock for as long as it lives, also through kill -9, and only who gets it alone may clean.
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
            log.info("another run is at work on this machine: its shared memory is left alone")
    else:
        _held = -1
    if min(dist.all_gather_object(alone)):  # the cleaner waits for all processes: all call it, or none
        clean_stale_shared_memory()
    if dist.get_local_rank() == 0:
        fcntl.flock(_held, fcntl.LOCK_SH)
