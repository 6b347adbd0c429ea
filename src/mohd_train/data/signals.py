"""Data workers and SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType

GRACE = 60  # seconds a worker works on


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE)


def outlive_sigterm(worker: int) -> None:
    """Lets a worker live on for a while: schedulers send SIGTERM to all processes of a job, and the run still ends its batch and
    saves. A worker ends with its run in any case. `worker` is its number."""
    signal.signal(signal.SIGTERM, _end_later)
