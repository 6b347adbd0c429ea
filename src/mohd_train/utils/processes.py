"""Commands that end with the program that started them: N at a time, each with a log, stopped politely.

A command gets a session of its own: a Ctrl-C on the terminal, or its hang-up, reaches only the supervisor, which passes on
one SIGTERM, waits until the whole process group is gone (a launcher may die before its ranks have saved), and kills what is
left. Only kill -9 of the supervisor leaves a command running; a lock that it inherited (``keep``) shows that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.utils.terminal import unbreakable_output

GRACE = 60.0  # seconds from SIGTERM to SIGKILL: a run saves its checkpoint in between
POLL = 0.5  # seconds between polls of the commands
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor moves, which don't belong in a log

Slot = dict[str, str]  # what differs in a command's environment: its GPUs, its share of the cores


class Every:
    """A periodic timer."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether the period has passed; if so, the next one starts now."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


class Interrupts:
    """Within it, SIGINT, SIGTERM and SIGHUP are counted instead of raised, so that none arrives between a command's start and
    its registration. Outside the main thread they are left alone."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:  # nohup stays nohup
                    self._before[number] = signal.signal(number, lambda which, frame: self.signals.append(which))
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises KeyboardInterrupt if a signal has come."""
        end = time.monotonic() + seconds
        while not self.signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        if self.signals:
            raise KeyboardInterrupt

    def impatient(self, since: int) -> bool:
        """Whether another Ctrl-C has come after the first ``since`` signals."""
        return signal.SIGINT in self.signals[since:]


class Command:
    """A running command, in a session and process group of its own.

    Args:
        args: the program and its arguments.
        log: its output is appended here, after a line ``$ args``.
        environment: what its environment adds to, or changes in, ours.
        keep: file descriptors that it inherits: a lock stays held as long as it lives, even without us.
        echo: show its output on our stdout too; on a terminal it sees one, so that its progress bars are drawn.
        shown: what the log shows in place of ``args``.

    Raises:
        UserError: the log can't be written or the program can't be started.
    """

    def __init__(
        self,
        args: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        keep: Iterable[int] = (),
        echo: bool = False,
        shown: str | None = None,
    ) -> None:
        self.log, self.began, self._last_output = log, time.monotonic(), time.monotonic()
        self._quiet, self._reader = threading.Event(), None
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(f"$ {shown or shlex.join(args)}\n".encode())
                file.flush()
                reading, writing = _terminal_or_pipe() if echo else (None, file.fileno())
                self.process = subprocess.Popen(
                    args,
                    stdin=subprocess.DEVNULL,
                    stdout=writing,
                    stderr=writing,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                    pass_fds=tuple(keep),
                )
        except OSError as error:
            raise UserError(f"can't start `{shown or shlex.join(args)}` with its log in {log}: {error}") from None
        if reading is not None:
            os.close(writing)
            self._reader = threading.Thread(target=self._copy, args=(reading, log), daemon=True)
            self._reader.start()

    @property
    def pid(self) -> int:
        """Of the command, and the id of its process group."""
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Whatever a failed command leaves behind in its group is stopped."""
        code = self.process.poll()
        if code is not None:
            if code != 0 and group_alive(self.pid):
                end_groups([self.pid], grace=GRACE)
            self._finish_output()
        return code

    @property
    def silent_for(self) -> float:
        """Seconds since its last output, if it is echoed."""
        return time.monotonic() - self._last_output

    def silence(self) -> None:
        """Stops echoing: later output goes only to the log."""
        self._quiet.set()

    def _finish_output(self) -> None:
        if self._reader is not None:
            self._reader.join(timeout=5)  # a helper process that outlives the command may hold the pipe open

    def _copy(self, reading: int, path: Path) -> None:
        """Copies everything to our stdout at once; to the log only complete lines, and the last state of a redrawn one."""
        line = b""
        with path.open("ab") as log:
            while True:
                try:
                    chunk = os.read(reading, 1 << 16)
                except OSError:  # how a pseudo-terminal says that its other end was closed
                    chunk = b""
                self._last_output = time.monotonic()
                if not self._quiet.is_set():
                    with contextlib.suppress(OSError, ValueError):  # our terminal is gone; the command must not stall
                        sys.stdout.buffer.write(chunk)
                        sys.stdout.buffer.flush()
                *whole, line = (line + chunk).split(b"\n")
                whole += [line] if line and not chunk else []
                with contextlib.suppress(OSError):  # the log's disk is full
                    for text in whole:
                        log.write(ESCAPES.sub(b"", text.rstrip(b"\r").rsplit(b"\r", 1)[-1]) + b"\n")
                    log.flush()
                if not chunk:
                    os.close(reading)
                    return


def _terminal_or_pipe() -> tuple[int, int]:
    """(reading end, writing end): of a pseudo-terminal as wide as ours, or of a pipe where we have none."""
    if not sys.stdout.isatty():
        return os.pipe()
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, b"\0" * 8))
    attributes = termios.tcgetattr(writing)
    attributes[1] &= ~termios.ONLCR  # no \r\n in the log
    termios.tcsetattr(writing, termios.TCSANOW, attributes)
    return reading, writing


def group_alive(group: int) -> bool:
    """Whether a process group still has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number was reused by another user's process
        return False
    return True


def end_groups(
    groups: Sequence[int],
    *,
    grace: float,
    impatient: Callable[[], bool] = lambda: False,
    reap: Callable[[], object] = lambda: None,
) -> None:
    """Sends SIGTERM to all process groups at once, and SIGKILL to what is left after ``grace`` seconds, or once ``impatient``.

    Args:
        reap: collects the exit codes of our own children, which count as members of their group until then.
    """
    for group in groups:
        _signal_group(group, signal.SIGTERM)
    end = time.monotonic() + grace
    while time.monotonic() < end and not impatient():
        reap()
        if not any(map(group_alive, groups)):
            return
        time.sleep(0.05)
    for group in groups:
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@dataclass
class Job:
    """A command to be run by :meth:`Supervisor.run_all`.

    Attributes:
        name: of it.
        start: starts it in a slot. A UserError says why it can't be; the others go on.
        ended: called with the exit code, also of a stopped command.
    """

    name: str
    start: Callable[[Slot], Command]
    ended: Callable[[Command, int], None]


class Supervisor:
    """Runs commands and outlives all of them, unless it is killed with -9.

    As a context manager, it turns SIGINT, SIGTERM and SIGHUP into a KeyboardInterrupt at the next look, and on any error
    stops every command first: SIGTERM to all, :data:`GRACE` seconds (a second Ctrl-C cuts them short), SIGKILL. What is
    printed meanwhile can't end it: neither a terminal that went away nor a full disk.

    Attributes:
        adopted: process groups that another supervisor left behind, to be stopped with ours.
    """

    def __init__(self) -> None:
        self.interrupts = Interrupts()
        self._within = contextlib.ExitStack()
        self.adopted: list[int] = []
        self._at_work: dict[str, tuple[Job, Command]] = {}

    def __enter__(self) -> Supervisor:
        self._within.enter_context(unbreakable_output())
        self._within.enter_context(self.interrupts)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._at_work or (self.adopted and any(error)):
                self._stop()
        finally:
            self._within.close()

    def start(self, job: Job, slot: Slot) -> Command:
        """Starts a job. Raises the UserError of its ``start``."""
        command = job.start(slot)
        self._at_work[job.name] = (job, command)
        return command

    def collect(self) -> list[str]:
        """Names of the jobs that have ended since the last look."""
        ended = []
        for name, (job, command) in list(self._at_work.items()):
            code = command.poll()
            if code is not None:
                del self._at_work[name]
                ended.append(name)
                job.ended(command, code)
        return ended

    def run_all(
        self,
        jobs: Iterable[Job],
        slots: Sequence[Slot],
        *,
        refused: Callable[[Job, UserError], None],
        occupied: Callable[[], Sequence[Slot]] = lambda: (),
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs all jobs, at most one in a slot; one that fails does not stop the others.

        Args:
            refused: called for a job that could not be started.
            occupied: slots in use by others' commands, polled before each start and until none is left.
            look: called about twice a second, to show progress.
        """
        todo, used = list(jobs), dict[str, Slot]()
        while True:
            theirs = list(occupied())
            while todo and (free := free_slots(slots, [*used.values(), *theirs])):
                job = todo.pop(0)
                try:
                    self.start(job, free[0])
                except UserError as error:
                    refused(job, error)
                else:
                    used[job.name] = free[0]
            if not (todo or self._at_work or theirs):
                return
            self.interrupts.wait(POLL)
            for name in self.collect():
                used.pop(name, None)
            look()

    def run(self, job: Job, look: Callable[[Command], None] = lambda command: None) -> None:
        """Runs one job to its end."""
        command = self.start(job, {})
        while job.name in self._at_work:
            self.interrupts.wait(min(POLL, 0.1))
            self.collect()
            look(command)

    def _stop(self) -> None:
        since = len(self.interrupts.signals)
        for _, command in self._at_work.values():
            command.silence()  # what its processes print about the interruption is for the log
        processes = [command.process for _, command in self._at_work.values()]
        end_groups(
            [*(process.pid for process in processes), *self.adopted],
            grace=GRACE,
            impatient=lambda: self.interrupts.impatient(since),
            reap=lambda: [process.poll() for process in processes],
        )
        for process in processes:
            process.wait()
        self.collect()


def free_slots(slots: Sequence[Slot], used: Iterable[Slot]) -> list[Slot]:
    """The slots that are left: each one that is used takes an equal one, else one that shares a GPU with it, else any
    without GPUs."""

    def gpus(slot: Slot) -> set[str]:
        return set(filter(None, slot.get("CUDA_VISIBLE_DEVICES", "").split(",")))

    free = list(slots)
    for slot in used:
        taken = next((one for one in free if one == slot), None)
        taken = taken or next((one for one in free if gpus(one) & gpus(slot)), None)
        taken = taken or next((one for one in free if not gpus(one) and not gpus(slot)), None)
        if taken is not None:
            free.remove(taken)
    return free


class SharedLock:
    """A lock file that is held as long as any process has its descriptor: the one that took it, and the commands that
    inherited it (``keep``). A kill, even -9, releases it; a command that outlives its supervisor still holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def take(self, wait: float = 1.0) -> bool:
        """Takes the lock if it is free, and returns whether it did. ``wait``: seconds for a mere check (:meth:`held`) to finish."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    os.close(descriptor)
                    return False
                time.sleep(0.005)
            else:
                self.descriptor = descriptor
                return True

    def release(self) -> None:
        """Releases it in this process; a child that inherited it still holds it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def held(self) -> bool:
        """Whether some process holds it."""
        if not self.path.exists():
            return False
        if not self.take(wait=0.05):
            return True
        self.release()
        return False

    @contextlib.contextmanager
    def holding(self, busy: str) -> Iterator[int]:
        """Holds it within the context; yields the descriptor. Raises UserError ``busy`` if another process holds it."""
        if not self.take():
            raise UserError(busy)
        assert self.descriptor is not None
        try:
            yield self.descriptor
        finally:
            self.release()
