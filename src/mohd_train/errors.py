"""Errors that a user can act on, and the one door through which command-line programs end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT)
GRACE = 5.0  # seconds that other threads may run on after the main one


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where (file, key, shard), and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs ``main`` and exits: 0, or its return value; 1 with one clear line for bad input or a full disk; 130 for Ctrl-C.

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
    except BrokenPipeError:  # the reader is gone, as with `| head`: there is nobody to report to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = (
            error.filename2 or error.filename or "where it writes"
        )  # an error of writing to an open file doesn't name it
        print(f"error: no space left ({place}); make room, and run the command again", file=sys.stderr, flush=True)
        _leave(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(status or 0)


def causes(error: BaseException) -> list[BaseException]:
    """An error and those that caused it, the first cause last."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _leave(status: int) -> NoReturn:
    """Exits even if a library's thread would keep the process alive: streaming's outlive a shard that never arrives."""

    def end() -> None:
        threading.main_thread().join()  # over as soon as the interpreter shuts down and waits for the other threads
        time.sleep(GRACE)
        os._exit(status)

    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(GRACE)  # the launcher ends all ranks once one has ended: the first has to say what is wrong
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        threading.Thread(target=end, daemon=True).start()
    sys.exit(status)
