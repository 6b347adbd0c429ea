"""Progress of long work: a bar on a terminal; elsewhere a plain line now and then, so that a log shows signs of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mohd_train.utils.text import duration

LINE_EVERY = 30.0  # seconds between plain lines and before the first one: quick work prints nothing
Report = Callable[..., None]  # report(done, total, note="")


@contextmanager
def progress(console: Console, name: str, total: int | None = None) -> Iterator[Report]:
    """Shows progress; yields ``report(done, total, note="")``, to be called as often as convenient.

    Args:
        name: what the work is, in a few words.
        total: steps, if known at the start.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(name, total=total, note="")
            yield lambda done, total, note="": bars.update(bar, completed=done, total=total, note=note)
        return
    lines = _Lines(console, name, total)
    thread = threading.Thread(target=lines.run, name=f"progress of {name}", daemon=True)
    thread.start()
    try:
        yield lines.report
    finally:
        lines.over.set()
        thread.join()


class _Lines:
    """Prints a line every :data:`LINE_EVERY` seconds, whether or not anything was reported in between."""

    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self.console, self.name, self.over = console, name, threading.Event()
        self.state: tuple[int, int | None, str] = (0, total, "")
        self.start = time.monotonic()

    def report(self, done: int, total: int | None, note: str = "") -> None:
        self.state = done, total, note

    def run(self) -> None:
        while not self.over.wait(LINE_EVERY):
            self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """``sciq: 1,200 of 4,000 (30%), 1m 10s, 2m 43s left``."""
        (done, total, note), spent = self.state, time.monotonic() - self.start
        known = f"{done:,} of {total:,} ({done / total:.0%})" if total else f"{done:,}"
        left = f", {duration(spent * (total - done) / done)} left" if total and done else ""
        return f"{self.name}: {known}, {duration(spent)}{left}{f', {note}' if note else ''}"
