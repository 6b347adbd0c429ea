from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest

from mohd_train.errors import UserError, run_cli

PROGRAM = """
import threading
from mohd_train.errors import UserError, run_cli

def main():
    if {thread}:
        threading.Thread(target=threading.Event().wait).start()
    raise UserError("one\\nline")

run_cli(main)
"""


@pytest.mark.parametrize("thread", [False, True])
def test_bad_input_ends_in_one_line_and_1_even_where_a_thread_hangs(thread: bool) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(thread=thread)], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (1, "error: one line\n")


def test_exit_codes() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    for main, code in ((lambda: None, 0), (lambda: 3, 3), (fail, 130)):
        with pytest.raises(SystemExit) as ended:
            run_cli(main)
        assert ended.value.code == code


def test_a_program_within_a_program_goes_on() -> None:
    """Where run_cli is called with other threads about, only SystemExit leaves it."""

    def bad() -> None:
        raise UserError("bad")

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with pytest.raises(SystemExit):
        run_cli(bad)
    stop.set()
    thread.join()


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/sweep.json")

    with pytest.raises(SystemExit) as caught:
        run_cli(full)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: no space left (out/sweep.json); make room, and run the command again\n"


def test_bugs_keep_their_traceback() -> None:
    def broken() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_cli(broken)
    assert issubclass(UserError, ValueError)


def test_a_reader_that_leaves_is_no_error() -> None:
    """``command | head -1``: no traceback, and the exit code that shells give it."""
    program = "from mohd_train.errors import run_cli\nrun_cli(lambda: [print('x' * 1000) for _ in range(1000)] and 0)"
    command = f'{sys.executable} -c "{program}"; echo $? >&2'
    done = subprocess.run(["bash", "-c", f"( {command} ) | head -1"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "x" * 1000 + "\n"
    assert done.stderr.split() == ["141"]
