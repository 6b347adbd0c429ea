"""Ends data workers that are frozen, which the loader's own timeout does not notice."""

from __future__ import annotations

import logging
import multiprocessing
import threading

from composer.core import Callback, Event, State
from composer.loggers import Logger

log = logging.getLogger(__name__)
SLACK = 5.0  # seconds beyond the loader's own timeout, which does less harm where it works
# From here on the trainer waits for a batch, until it arrives or there are no more.
WAITS = (Event.BEFORE_DATALOADER, Event.EVAL_START, Event.EVAL_BATCH_END)
COME = (Event.AFTER_DATALOADER, Event.EPOCH_END, Event.EVAL_BATCH_START, Event.EVAL_END)


class WorkerWatch(Callback):
    """Kills the data workers when a batch does not come within ``seconds`` and :data:`SLACK`.

    A worker hands a batch over by a socket and answers there when the batch is taken. Taking it from a worker that has
    stopped (SIGSTOP, a frozen cgroup) therefore waits forever: the loader's timeout no longer applies. Once they are killed, the
    loader raises.

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
            log.error("no batch for %g s: killing the data workers", self.seconds + SLACK)
        for worker in workers:
            worker.kill()

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Between the events, a batch is waited for or has come."""
        if event in WAITS:
            self._start()
        elif event in COME:
            self._stop()

    def close(self, state: State, logger: Logger) -> None:
        """The run is over."""
        self._stop()
