"""Errors that a user can act on, and the one door through which command-line programs end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where (file, key, shard), and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs ``main`` and exits: 0, or its return value; 1 with one clear line for bad input; 130 for Ctrl-C.

    Usage errors leave through argparse, with 2. Anything else is a bug and keeps its traceback.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except PermissionError as error:
        print(f"error: no permission to write or read {error.filename}; choose another folder", file=sys.stderr)
        _leave(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(status or 0)


def _leave(status: int) -> NoReturn:
    """Exits even where a library's thread would hold the process: streaming's outlive a shard that never came."""
    others = [
        thread for thread in threading.enumerate() if thread is not threading.current_thread() and not thread.daemon
    ]
    if others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
