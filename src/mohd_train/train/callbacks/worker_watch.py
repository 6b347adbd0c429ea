"""Data workers that are frozen, not just slow: the loader's own timeout does not see them."""

from __future__ import annotations

import logging
import multiprocessing
import threading

from composer.core import Callback, State
from composer.loggers import Logger

log = logging.getLogger(__name__)
SLACK = 5.0  # seconds beyond the loader's own timeout, which ends a wait with less harm where it can


class WorkerWatch(Callback):
    """Kills the data workers when a batch does not come within ``seconds`` and :data:`SLACK`.

    A worker hands a batch over by a socket and answers there when the batch is taken. Taking it from a worker that has stopped
    (SIGSTOP, a frozen cgroup) therefore waits for ever: the loader's timeout is over. Once they are killed, the loader raises.

    Args:
        seconds: ``data.worker_timeout``; 0 turns it off.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.fired = False
        self._timer: threading.Timer | None = None

    def _start(self) -> None:
        self._stop()
        if self.seconds:
            self._timer = threading.Timer(self.seconds + SLACK, self._kill)
            self._timer.daemon = True
            self._timer.start()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _kill(self) -> None:
        workers = [child for child in multiprocessing.active_children() if child.daemon]
        if workers:
            self.fired = True
            log.error("no batch for %g s: the data workers are killed", self.seconds + SLACK)
        for worker in workers:
            worker.kill()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A training batch is waited for."""
        self._start()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """It came."""
        self._stop()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """There are no more."""
        self._stop()

    def eval_start(self, state: State, logger: Logger) -> None:
        """A validation batch is waited for."""
        self._start()

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """It came."""
        self._stop()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """The next one is waited for."""
        self._start()

    def eval_end(self, state: State, logger: Logger) -> None:
        """There are no more."""
        self._stop()

    def close(self, state: State, logger: Logger) -> None:
        """The run is over."""
        self._stop()
