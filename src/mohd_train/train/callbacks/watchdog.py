"""Reports and ends a start that hangs (a file system, a collective that one rank never enters, a download)."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

REPORT_TIME = 10.0  # seconds for every rank to write before the first one's end makes the launcher end the others
LINES = 12  # of the main thread's stack on the terminal; the file has all


class FirstBatchWatchdog(Callback):
    """Writes this rank's stacks to ``logs/rank{r}.stacks.txt`` and ends it with 1 when no batch is done within
    ``seconds``.

    A C thread writes the stacks, so they appear even if Python itself is stuck. Until then nothing is
    written to the run folder, which may turn out to be another run's.

    Args:
        folder: the run folder.
        seconds: from :meth:`start` to the end of the session's first batch.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path = folder / "logs" / f"rank{os.environ.get('RANK', '0')}.stacks.txt"
        self.seconds = seconds
        self._done = threading.Event()

    def start(self) -> None:
        """Starts the clock."""
        self._file = tempfile.NamedTemporaryFile("w+", prefix="mohd_train-stacks-", suffix=".txt")  # noqa: SIM115
        faulthandler.dump_traceback_later(self.seconds, file=self._file)
        threading.Thread(target=self._wait, daemon=True, name="first-batch watchdog").start()

    def _wait(self) -> None:
        if self._done.wait(self.seconds + 0.5):
            return
        stack = Path(self._file.name).read_text(encoding="utf-8")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(stack, encoding="utf-8")
        # The main thread is the last one.
        main = "\n".join(stack[stack.rfind("\n\n") + 1 :].strip().splitlines()[: LINES + 1])
        print(
            f"error: rank {os.environ.get('RANK', '0')}: no batch after start_timeout={self.seconds:g} seconds; the stacks of "
            f"every rank are in {self.path.parent}/rank*.stacks.txt, and this one hangs at:\n{main}",
            file=sys.stderr,
            flush=True,
        )
        if not self._done.wait(REPORT_TIME):
            os._exit(1)

    def batch_end(self, state: State, logger: Logger) -> None:
        """It trains."""
        self.cancel()

    def cancel(self) -> None:
        """Stops the clock."""
        if not self._done.is_set():
            self._done.set()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
