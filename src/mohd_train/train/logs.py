"""Python's logging: everything goes to the run folder, only errors to the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

_handlers: list[logging.Handler] = []  # ours on the root logger
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_folder(folder: Path, level: str) -> None:
    """Sends log records of ``level`` and up, and Python warnings, to ``folder/logs/rank{rank}.log``; errors to stderr
    too.

    Composer and torch warn of much that a user can't act on; it is kept in the file, and the terminal stays
    readable. Composer's own ``logging.basicConfig`` does nothing where the root logger has handlers.
    """
    rank = os.environ.get("RANK", "0")
    path = folder / "logs" / f"rank{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    while _handlers:  # from an earlier run in this process
        root.removeHandler(_handlers[-1])
        _handlers.pop().close()
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setLevel(level.upper())
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setLevel(logging.ERROR)
    handlers: tuple[logging.Handler, ...] = (to_file, to_terminal)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        _handlers.append(handler)
        root.addHandler(handler)
    logging.getLogger("streaming").propagate = True
    logging.captureWarnings(True)
    warnings.simplefilter("default")  # each warning once per location, in the file
