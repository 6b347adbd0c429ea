"""SIGTERM: save at the end of the batch, and leave with 0. Schedulers send it before they take a machine away."""

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
from mohd_train.errors import raise_on_interrupt
from mohd_train.train.callbacks.run_recorder import RunRecorder

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1


class Preempted(BaseException):
    """The run was asked to stop. Not an Exception: no `except Exception` of a library may swallow it."""


class StopSignal:
    """Whether SIGTERM came. Before training it ends the process at once, since there is nothing to save."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked = True
        if not self.training:
            raise Preempted


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Handles SIGTERM within; the handler from before comes back after. Outside the main thread signals can't be handled."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    follow_launcher()
    raise_on_interrupt()
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def follow_launcher() -> None:
    """Has the kernel send SIGTERM to this rank when the launcher that started it dies, so that no rank is left alone (Linux)."""
    if "LOCAL_WORLD_SIZE" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Preemption(Callback):
    """Saves and ends the run once any rank has been asked to stop: after the batch in progress, or before the next batch of a
    validation, which the resumed run then does over. It must stand after the saver in ``state.callbacks``.

    Args:
        stop: this rank's signal.
        saver: the run's saver.
        recorder: notes the checkpoint.
    """

    def __init__(self, stop: StopSignal, saver: CheckpointSaver, recorder: RunRecorder) -> None:
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
        asked = state.device.tensor_to_device(torch.tensor([int(self.stop.asked)]))
        dist.all_reduce(asked, reduce_operation="MAX")
        if not asked.item():
            return
        log.info("SIGTERM: saving batch %s", state.timestamp.batch.value)
        self.validation_due = validation_due
        self.saver.save_now(state, logger)
        self.recorder.batch_checkpoint(state, logger)
        raise Preempted

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation of this batch was left out."""
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run does it before it goes on."""
        self.validation_due = state["validation_due"]
