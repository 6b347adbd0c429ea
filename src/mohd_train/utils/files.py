"""Atomic files, and locks that end with their process."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mohd_train.errors import UserError

log = logging.getLogger(__name__)
# errors of file systems without locks; any other failure to lock is a failure
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path next to ``path`` to write to; on exit it replaces ``path``, durable even if the machine loses
    power.

    If the body raises, nothing is left behind and an older file stays. The folder is created. The temporary name keeps
    the suffix, which decides the format for some writers (matplotlib).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's 0600 would keep colleagues from reading
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file atomically: a reader, or a crash of the machine, sees the old one or the new one. Text is UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any, *, default: Callable[[Any], Any] = str) -> None:
    """:func:`write_atomic` of JSON, indented; ``default`` turns what JSON lacks into something it has."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, default=default) + "\n")


def write_output(path: str | Path, content: bytes | str) -> None:
    """:func:`write_atomic` for a place that a command line named with ``--output``. Raises UserError if it can't be
    written to."""
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another path with --output") from None


def sync(path: str | Path) -> None:
    """Flushes a file, or the renames inside a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """Holds a lock file; the kernel releases it when the process ends, even by kill -9. Forked children don't keep it.

    The file stays after the release: removing it would let two processes lock two files of one name.

    Args:
        path: the lock file; its folder must exist.
        busy: the error message if another process holds it; ``{holder}`` is "process 12 on HOST".
        wait: seconds to wait for it.

    Raises:
        UserError: another live process holds it.
    """

    def __init__(self, path: Path, busy: str, wait: float = 2.0) -> None:
        self.path = path
        self._lock = FileLock(path, mode=0o644, thread_local=False, poll_interval=0.1)
        try:
            self._lock.acquire(timeout=wait)
        except Timeout:
            holder = path.read_text(encoding="utf-8", errors="replace").strip() or "unknown process"
            raise UserError(busy.format(holder=holder)) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks; a second process would not be noticed", path)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def release(self) -> None:
        """Gives it back."""
        self._lock.release(force=True)
