"""Progress of a preparation: a bar where there is a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL = 10.0  # seconds between lines


class TokenProgress:
    """Documents/s, tokens/s and the time left, by bytes of the raw files. Work found done counts for the bar, not the rates."""

    def __init__(self, total_bytes: int, *, show: bool = True) -> None:
        self._total, self._done, self._new = max(1, total_bytes), 0, 0
        self._documents, self._tokens = 0, 0
        self._start = self._last = time.monotonic()
        self._show = show
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn("tokenizing"),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f}% {task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            if show and console.is_terminal
            else None
        )
        self._task = self._bar.add_task("", total=self._total) if self._bar else None

    def __enter__(self) -> TokenProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            self._say(final=True)

    def skip(self, source_bytes: int) -> None:
        """Work that an earlier run did."""
        self._done += source_bytes
        self._draw()

    def advance(self, source_bytes: int, documents: int, tokens: int) -> None:
        """Work done now."""
        self._done += source_bytes
        self._new += source_bytes
        self._documents += documents
        self._tokens += tokens
        self._draw()

    def _rates(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return f"{self._documents / elapsed:,.0f} docs/s, {self._tokens / elapsed:,.0f} tokens/s"

    def _draw(self) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=self._rates())
        elif time.monotonic() - self._last > _PLAIN_INTERVAL:
            self._say()

    def _say(self, *, final: bool = False) -> None:
        if not self._show:
            return
        self._last = time.monotonic()
        elapsed = self._last - self._start
        left = f", {(self._total - self._done) * elapsed / self._new:,.0f} s left" if self._new and not final else ""
        percent = 100 * self._done / self._total
        print(
            f"tokenizing: {percent:.1f}%, {self._documents:,} documents, {self._rates()}{left}",
            file=sys.stderr,
            flush=True,
        )
