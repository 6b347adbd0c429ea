"""Runs the demo: step after step, each shown, logged, and skipped where its output is there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mohd_train.demo.plan import Options, Step, claim, steps
from mohd_train.errors import UserError

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor moves, which a log is better without


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextlib.contextmanager
def _claimed(options: Options) -> Iterator[int]:
    """The output folder, for one demo at a time. Yields the lock: a step that outlives a killed demo goes on holding it."""
    claim(options)
    with open(options.folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another demo, or a step of one that was killed, is running in {options.out}; "
                "wait for it, end it, or choose another OUT"
            ) from None
        yield lock.fileno()


def run_demo(options: Options) -> None:
    """Runs what is not there yet, and prints the paths of the table and the figure last.

    Raises:
        UserError: the folder holds another demo, or a step fails; the message names it, its command and its log.
    """
    began = time.monotonic()
    with _claimed(options) as lock:
        todo = steps(options)
        print(f"Demo in {options.out}: {len(todo)} steps. Each is a command of its own, printed after `$`.", flush=True)
        if not options.raw:
            print(
                "The corpus, the models and the questions are toys: the path is real, the numbers mean nothing.",
                flush=True,
            )
        reused = 0
        for number, step in enumerate(todo, 1):
            heading = f"[{number}/{len(todo)}] {_clock(time.monotonic() - began)} {step.title}"
            there = step.done()
            if there is not None:
                print(f"\n{heading}: there already ({there})", flush=True)
                reused += 1
                continue
            under_way = step.under_way()
            print(f"\n{heading}" + (f", going on {under_way}" if under_way else "") + f"\n$ {step.line}", flush=True)
            _run(step, options.folder / "logs" / f"{step.name}.log", f"{number}/{len(todo)}", lock)
    print(f"\nDone in {_clock(time.monotonic() - began)}" + (f", {reused} steps reused" if reused else "") + ".")
    print(f"table   {options.out}/table.md\nfigure  {options.out}/curves.png", flush=True)


def _run(step: Step, log: Path, number: str, lock: int) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    programs = {name: str(Path(sys.executable).parent / name) for name in ("python", "composer")}
    command = [programs.get(step.command[0], step.command[0]), *step.command[1:]]
    with log.open("ab") as file:
        file.write(f"$ {step.line}\n".encode())
        code = _tee(command, file, lock)
    if code != 0:
        raise UserError(
            f"step {number} ({step.title}) failed with exit code {code}: `{step.line}`; its output is in {log}; "
            "once mended, run the demo again: it goes on from here"
        )
    if step.done() is None and step.name not in ("table", "curves"):
        raise UserError(
            f"step {number} ({step.title}) left no whole output although `{step.line}` succeeded; see {log}"
        )


def _tee(command: list[str], log: IO[bytes], *kept: int) -> int:
    """Runs ``command`` with its output both on the terminal, progress bars and all, and in the log; returns its exit code.

    The command inherits the file descriptors ``kept``.
    """
    terminal = sys.stdout.isatty()
    reading, writing = os.openpty() if terminal else os.pipe()
    if terminal:  # bars as wide as the real terminal; no \r\n in the log
        fcntl.ioctl(writing, termios.TIOCSWINSZ, fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, b"\0" * 8))
        attributes = termios.tcgetattr(writing)
        attributes[1] &= ~termios.ONLCR
        termios.tcsetattr(writing, termios.TCSANOW, attributes)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, pass_fds=kept)
    os.close(writing)
    quiet = threading.Event()
    reader = threading.Thread(target=_copy, args=(reading, log, quiet), daemon=True)
    reader.start()
    try:
        code = process.wait()
    except KeyboardInterrupt:
        quiet.set()  # the tracebacks of its processes are for the log
        print("\x1b[?25h" * terminal + "\ninterrupted: ending this step; run the demo again to go on", flush=True)
        raise
    finally:
        if process.poll() is None:  # interrupted: the command got the Ctrl-C too, and is left time to end by itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=45)  # the launcher gives its processes 30 s
            process.kill()
    reader.join(timeout=5)  # a helper process that outlives the command may hold the pipe open
    return code


def _copy(reading: int, log: IO[bytes], quiet: threading.Event) -> None:
    """Everything to the terminal at once, until ``quiet``; to the log whole lines, of a redrawn one the last state."""
    line = b""
    while True:
        try:
            chunk = os.read(reading, 1 << 16)
        except OSError:  # how a pseudo-terminal says that its other end was closed
            chunk = b""
        if not quiet.is_set():
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        *whole, line = (line + chunk).split(b"\n")
        whole += [line] if line and not chunk else []
        for text in whole:
            log.write(ESCAPES.sub(b"", text.rstrip(b"\r").rsplit(b"\r", 1)[-1]) + b"\n")
        log.flush()
        if not chunk:
            os.close(reading)
            return
