"""Signals that ask a run to stop: it saves at the end of the batch and exits.

SIGTERM and SIGUSR1 are what schedulers send before they take a machine away, SIGHUP comes when an ssh connection drops,
SIGINT is Ctrl-C.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from mohd_train.checkpoint.save import CheckpointSaver
from mohd_train.errors import UserError
from mohd_train.train.callbacks.run_recorder import RunRecorder

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was asked to stop; its argument names the signal. Not an Exception: no library's `except Exception` may
    swallow it."""


class StopRequest:
    """Whether this process was asked to stop, and why. Before training there is nothing to save, so a signal ends it at
    once.

    Attributes:
        number: the first signal that came, or -1 for :attr:`fault`; 0: none.
        fault: what ends the run once it has saved, such as a metrics file that can't be written.
        training: whether there is something to save.
    """

    def __init__(self) -> None:
        self.number = 0
        self.fault: UserError | None = None
        self.training = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C doesn't wait for the batch."""
        if not self.training or (self.number == number == signal.SIGINT):
            raise KeyboardInterrupt if number == signal.SIGINT else Preempted(signal.Signals(number).name)
        if number == signal.SIGINT:
            print(
                "stopping after this batch, once it is saved; Ctrl-C again stops at once", file=sys.stderr, flush=True
            )
        self.number = self.number or number

    def because_of(self, fault: UserError) -> None:
        """Makes the run save and then end with ``fault``."""
        self.fault = self.fault or fault
        self.number = self.number or -1


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handles :data:`SIGNALS` within; the handlers from before come back after. Only the main thread can handle
    signals."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    follow_launcher()
    # An ignored SIGHUP stays ignored: nohup asked for it.
    handled = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.handle) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            # Importing Composer turns Ctrl-C into a SystemExit, which would look like a failure.
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else handler)


def follow_launcher() -> None:
    """Makes the kernel send SIGTERM to this rank when its launcher dies, so that no rank is left alone (Linux)."""
    if "LOCAL_WORLD_SIZE" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Preemption(Callback):  # its state stands in checkpoints under this name
    """Saves and ends the run once any rank has been asked to stop: after the batch in progress, or before the next
    batch of a validation, which the resumed run then repeats. It must come after the saver in ``state.callbacks``.

    Args:
        stop: this rank's request.
        saver: the run's saver.
        recorder: records the checkpoint.
    """

    def __init__(self, stop: StopRequest, saver: CheckpointSaver, recorder: RunRecorder) -> None:
        self.stop, self.saver, self.recorder = stop, saver, recorder
        self.validation_due = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """From here on there is something to save."""
        self.stop.training = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After the batch, its validation and its checkpoint."""
        self._stop_if_asked(state, logger, validation_due=False)

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """A long validation must not outlast the notice that a scheduler gives."""
        if self.stop.training:
            self._stop_if_asked(state, logger, validation_due=True)

    def _stop_if_asked(self, state: State, logger: Logger, *, validation_due: bool) -> None:
        # Two flags, so that a fault on one rank isn't hidden by a signal on another.
        flags = [int(self.stop.number > 0) * self.stop.number, int(self.stop.number == -1)]
        asked = state.device.tensor_to_device(torch.tensor(flags))
        dist.all_reduce(asked, reduce_operation="MAX")
        number, is_fault = asked.tolist()
        if not number and not is_fault:
            return
        name = signal.Signals(number).name if number else "a fault"
        log.info("%s: saving batch %s", name, state.timestamp.batch.value)
        self.validation_due = validation_due
        self.saver.save_now(state, logger)
        self.recorder.batch_checkpoint(state, logger)
        if self.stop.fault is not None:
            raise self.stop.fault
        if is_fault:
            raise UserError("another rank ended the run; its message says why")
        raise KeyboardInterrupt if number == signal.SIGINT else Preempted(name)

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation of this batch was skipped."""
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run validates before it trains on."""
        self.validation_due = state["validation_due"]
