"""A sweep that really trains, killed and resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from sweep.sweep_support import SMALL, request
from train.test_run import assert_same_run

from mohd_train.run_folder.metrics import read_metrics
from mohd_train.sweep.commands import Request, launch, resume
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.status import run_status
from mohd_train.utils import processes

X2 = "tiny-355m-x2-s1"


def kill_after(batches: int, folder: Path) -> None:
    """Kill -9 of the process that trains in ``folder``, once it has logged as many batches."""
    limit = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) < batches and time.monotonic() < limit:
        time.sleep(0.01)
    holder = (folder / ".lock").read_text()  # "process N on HOST"
    os.kill(int(holder.split()[1]), signal.SIGKILL)


def test_a_killed_run_of_a_sweep_goes_on_exactly(
    sweep_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "POLL", 0.05)
    longer = (*SMALL, "max_duration=100ba", "save_interval=3ba", "eval_interval=10ba")
    whole, killed = (
        request(sweep_file, data, only=("x2",), out=tmp_path / name, overrides=longer) for name in ("whole", "killed")
    )
    assert launch(whole) == 0
    killer = threading.Thread(target=kill_after, args=(8, tmp_path / "killed" / X2))
    killer.start()
    assert launch(killed) == 1
    killer.join()
    folder = SweepFolder(tmp_path / "killed")
    assert run_status(folder, X2).state in ("killed", "failed")
    assert 8 <= len(read_metrics(folder.path / X2 / "metrics.jsonl")) < 100
    assert resume(Request(target=folder.path)) == 0
    last = next((tmp_path / "whole" / X2 / "checkpoints").glob("ep*-ba100-rank0.pt"))
    assert_same_run(tmp_path / "whole" / X2, folder.path / X2, last.name)
