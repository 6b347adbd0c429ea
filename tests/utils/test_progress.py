"""Long work shows that it lives: a bar on a terminal, plain lines elsewhere, also while nothing is reported."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from mohd_train.utils import progress as module
from mohd_train.utils.progress import progress


def wait_for(text: str, out: io.StringIO) -> str:
    limit = time.monotonic() + 30
    while not re.search(text, out.getvalue()):
        assert time.monotonic() < limit, out.getvalue()
        time.sleep(0.01)
    return out.getvalue()


def test_lines_come_now_and_then_also_in_a_step_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_EVERY", 0.02)
    out = io.StringIO()
    with progress(Console(file=out, width=40), "[1/2] sciq (0-shot)") as report:
        report(0, 4000, "the longest first, of 812 tokens")
        wait_for(r"\[1/2\] sciq \(0-shot\): 0 of 4,000 \(0%\), 0s, the longest first, of 812 tokens\n(.*\n)+", out)
        report(1000, 4000)
        assert re.search(r"1,000 of 4,000 \(25%\), \d+s, \d+s left$", wait_for("25%.*\n", out), re.MULTILINE)
    length = len(out.getvalue())
    time.sleep(0.1)
    assert len(out.getvalue()) == length  # nothing is left behind


def test_quick_work_and_work_that_fails_say_nothing() -> None:
    out = io.StringIO()

    def fail() -> None:
        with progress(Console(file=out), "quick", 3) as report:
            report(1, 3)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal_has_its_total_and_note_at_once() -> None:
    out = io.StringIO()
    with progress(Console(file=out, force_terminal=True, width=160), "mmlu [5-shot]") as report:
        report(0, 56168, "the longest first, of 2,048 tokens")
    assert "mmlu [5-shot]" in out.getvalue()
    assert "0/56168" in out.getvalue()
    assert "of 2,048 tokens" in out.getvalue()
