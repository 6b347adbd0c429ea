"""Runs that start together on one machine take their names in shared memory one after another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mohd_train.data.datasets import one_at_a_time

PROGRAM = """
import sys, time
from mohd_train.data.datasets import one_at_a_time

print("ready", flush=True)
sys.stdin.readline()
with one_at_a_time():
    start = time.monotonic()
    time.sleep(0.3)
    print(start, time.monotonic(), flush=True)
"""


def test_one_at_a_time() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2] / "src",
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:  # both, before either is waited for
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    spans = sorted(tuple(map(float, run.communicate(timeout=60)[0].split())) for run in runs)
    assert spans[0][1] <= spans[1][0]


def test_nodes_of_one_run_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, nodes wait for each other: one that held the other up would hold up both for ever."""
    with one_at_a_time():
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with one_at_a_time():
            pass
