"""One run of a launched sweep as a process: what the local launcher starts, and what a cluster's job is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mohd_train.errors import UserError
from mohd_train.sweep.folder import SweepFolder
from mohd_train.utils.environment import verb_command
from mohd_train.utils.files import write_atomic
from mohd_train.utils.processes import Command, Job, Slot, Supervisor


def train_command(config: Path, processes: int) -> list[str]:
    """The command that trains ``config``: under the composer launcher, or plain for a single process."""
    python, *args = verb_command("train", config)
    if processes == 1:
        return [python, "-u", *args]
    return [python, "-m", "composer.cli.launcher", "-n", str(processes), *args]  # it takes -m MODULE too


def threads(processes: int) -> str:
    """OMP threads of a process, where ``processes`` share this machine's cores."""
    return str(max(1, len(os.sched_getaffinity(0)) // processes))


@dataclass(frozen=True)
class Holder:
    """Who trains a run, according to the file of its lock; valid only while the lock is held.

    Attributes:
        host: of it.
        pid: of the command, and of its process group.
        launcher: the process that started it.
        slot: its GPUs, as set in its environment.
    """

    host: str
    pid: int
    launcher: int
    slot: Slot

    @property
    def orphaned(self) -> bool:
        """Whether it is running on this machine and its launcher was killed, so that nobody waits for it."""
        if self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).ppid() != self.launcher
        except psutil.Error:  # the command is gone; a process of its group still holds the lock
            return not psutil.pid_exists(self.launcher)


def holder(folder: SweepFolder, name: str) -> Holder | None:
    """Who trains a run; None if nobody does, or if that isn't known."""
    lock = folder.run_lock(name)
    if not lock.held():
        return None
    try:
        return Holder(**json.loads(lock.path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def orphans(folder: SweepFolder) -> dict[str, Holder]:
    """The runs that a killed launcher left running on this machine."""
    holders = {name: holder(folder, name) for name in folder.runs}
    return {name: found for name, found in holders.items() if found is not None and found.orphaned}


def run_job(folder: SweepFolder, name: str, processes: int, ended: Callable[[Command, int], None]) -> Job:
    """Trains one run under a supervisor. Its exit code is written next to its log before ``ended`` is called.

    Starting it raises UserError if another process trains it, or has finished it.
    """

    def start(slot: Slot) -> Command:
        lock = folder.run_lock(name)
        if not lock.take():
            raise UserError(f"{name} is being trained by another process (it holds {lock.path}); wait for it")
        try:
            if folder.finished(name):  # by another launcher, in the meantime
                raise UserError(f"{name} is already finished")
            folder.exit_path(name).unlink(missing_ok=True)
            assert lock.descriptor is not None
            command = Command(
                train_command(folder.config_path(name), processes),
                folder.log_path(name),
                environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads(processes)), **slot},
                keep=[lock.descriptor],
            )
            said = Holder(socket.gethostname(), command.pid, os.getpid(), slot)
            with contextlib.suppress(OSError):  # the disk is full: others can't tell who trains it
                os.ftruncate(lock.descriptor, 0)
                os.pwrite(lock.descriptor, json.dumps(vars(said)).encode(), 0)
            return command
        finally:
            lock.release()  # the command holds it

    def note_exit(command: Command, code: int) -> None:
        try:
            write_atomic(folder.exit_path(name), f"{code}\n")
        except OSError as error:
            print(f"{name}: its exit code {code} can't be recorded ({error})", flush=True)
        ended(command, code)

    return Job(name, start, note_exit)


def run_one(folder: SweepFolder, name: str, processes: int) -> int:
    """Trains one run to its end: what a cluster's job calls. A finished one is skipped. Returns the exit code.

    Raises:
        UserError: the sweep has no such run, or another process trains it.
    """
    if name not in folder.runs:
        raise UserError(f"{folder.path} has no run {name!r}; it has {', '.join(folder.runs) or 'none'}")
    if folder.finished(name):
        print(f"{name} is already finished", flush=True)
        return 0
    codes: list[int] = []
    # a scheduler's warning before the kill: the run saves, and its exit code is ours
    with contextlib.suppress(KeyboardInterrupt), Supervisor() as supervisor:
        supervisor.run(run_job(folder, name, processes, lambda command, code: codes.append(code)))
    return codes[0] if codes else 130
