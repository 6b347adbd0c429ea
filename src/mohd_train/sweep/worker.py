"""One run of a launched sweep, as a process: what the local launcher starts, and what a cluster's job is."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.sweep.file import CHECKOUT
from mohd_train.sweep.folder import Lock, SweepFolder
from mohd_train.utils.files import write_atomic

GRACE = 60.0  # seconds between the polite request to stop and the kill


def train_command(config: Path, processes: int) -> list[str]:
    """The command that trains ``config``: under the composer launcher, or plain where one process is all."""
    script = [str(CHECKOUT / "scripts" / "train.py"), str(config)]
    if processes == 1:
        return [sys.executable, "-u", *script]
    return [sys.executable, "-m", "composer.cli.launcher", "-n", str(processes), *script]


def threads(processes: int) -> str:
    """OMP threads of a process, where ``processes`` share this machine's cores."""
    return str(max(1, len(os.sched_getaffinity(0)) // processes))


class Worker:
    """A started run.

    Raises:
        UserError: another process trains it already.
    """

    def __init__(
        self, folder: SweepFolder, name: str, processes: int, environment: dict[str, str] | None = None
    ) -> None:
        self.folder, self.name = folder, name
        self.began = time.monotonic()
        self._lock = Lock(folder, name)
        if not self._lock.take():
            raise UserError(f"{name} is being trained by another process (it holds {self._lock.path}); wait for it")
        command = train_command(folder.config_path(name), processes)
        folder.exit_path(name).unlink(missing_ok=True)
        folder.log_path(name).parent.mkdir(parents=True, exist_ok=True)
        assert self._lock.descriptor is not None
        with folder.log_path(name).open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": threads(processes)} | os.environ | (environment or {}),
                start_new_session=True,  # Ctrl-C reaches it through stop(), once
                pass_fds=(self._lock.descriptor,),  # held for as long as it lives, also without us
            )
        self._lock.release()

    def poll(self) -> int | None:
        """The exit code, written down too; None while it trains."""
        code = self.process.poll()
        if code is not None:
            write_atomic(self.folder.exit_path(self.name), f"{code}\n".encode())
        return code

    def stop(self) -> None:
        """A preemption's notice to the run: it saves and ends."""
        self._signal(signal.SIGTERM)

    def finish(self) -> int:
        """Waits after :meth:`stop`, and kills what does not end. Returns the exit code."""
        try:
            self.process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()
        code = self.poll()
        assert code is not None
        return code

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def run_one(folder: SweepFolder, name: str, processes: int) -> int:
    """Trains one run to its end: what a cluster's job calls. A finished one is left alone. Returns the exit code.

    Raises:
        UserError: the sweep has no such run, or another process trains it.
    """
    if name not in folder.runs:
        raise UserError(f"{folder.path} has no run {name!r}; it has {', '.join(folder.runs) or 'none'}")
    if folder.finished(name):
        print(f"{name} is already finished", flush=True)
        return 0
    worker = Worker(folder, name, processes)
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        worker.stop()

    for number in (signal.SIGTERM, signal.SIGINT):  # a scheduler's notice before the kill
        signal.signal(number, stop)
    while (code := worker.poll()) is None and not stopped:
        time.sleep(0.5)
    return worker.finish() if code is None else code
