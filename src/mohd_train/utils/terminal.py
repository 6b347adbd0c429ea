"""Output whose failure ends nothing: a terminal goes away, a log's disk fills up, a pipe accepts only ASCII
alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class Unbreakable:
    """A text stream whose writes never raise; what can't be written is dropped, a character that can't be encoded
    replaced.

    Args:
        stream: handles everything but writing.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_lost = False

    def write(self, text: str) -> int:
        """Writes, or drops, ``text``."""
        try:
            try:
                return self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                return self.stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):  # ValueError: closed
            self.is_lost = True
            return len(text)

    def flush(self) -> None:
        """Flushes what can be."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.is_lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Within it, ``sys.stdout`` and ``sys.stderr`` are :class:`Unbreakable`.

    A lost stream stays lost: its descriptor points to /dev/null from then on, or Python's last flush
    would fail and change the exit code.
    """
    before = sys.stdout, sys.stderr
    streams = [Unbreakable(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            if stream.is_lost:
                with contextlib.suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, stream.fileno())
                    os.close(nowhere)
