"""One live run in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from mohd_train.errors import UserError

log = logging.getLogger(__name__)
NAME = ".lock"
# Not every file system has locks. Elsewhere a failure to lock is a failure.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Holds ``folder/.lock`` by flock, which the kernel takes back when the process ends, also by kill -9.

    A forked child (a data worker) would inherit the lock and outlive a killed run by seconds, so it closes its copy at once.

    Args:
        folder: the run folder; it must exist.

    Raises:
        UserError: another live process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(self._descriptor)
        except BlockingIOError:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{folder} is in use by a run that is alive ({holder or 'unknown process'}); stop it first, or set another run_name"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                self.release()
                raise
            log.warning("%s: this file system has no locks; a second run in this folder would not be noticed", folder)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.register_at_fork(after_in_child=self.release)

    @staticmethod
    def _take(descriptor: int) -> None:
        """Waits a moment before it gives up: a worker forked just before the kill may not have closed its copy yet."""
        for wait in (0.1, 0.2, 0.4, 0.8):
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(wait)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Gives the folder back. The file stays: removing it would let two runs lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
