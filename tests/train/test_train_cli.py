"""``scripts/train.py`` as a user runs it: exit codes, two processes, kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train.test_run import assert_same_run
from train.train_support import ROOT, make_config, make_data, write_config

from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.train import train

SCRIPT = str(ROOT / "scripts" / "train.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
LAUNCHER = [sys.executable, "-m", "composer.cli", "-n", "2"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return write_config(folder, make_data(folder / "data"))


def test_bad_input_is_one_line_and_exit_code_1(config: Path) -> None:
    done = run(sys.executable, SCRIPT, str(config), "optimizer.lrr=1")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "error: override 'optimizer.lrr=1': unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)"
    )
    assert done.stdout == ""


def test_usage_is_exit_code_2() -> None:
    done = run(sys.executable, SCRIPT)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_print_config(config: Path) -> None:
    done = run(sys.executable, SCRIPT, str(config), "optimizer.lr=1.0e-3", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "router_lr: 0.001" in done.stdout  # resolved: the router follows


@pytest.mark.parametrize("program", [[SCRIPT], ["-m", "mohd_train.cli", "train"]])
def test_launcher_passes_the_error_on(config: Path, program: list[str]) -> None:
    done = run(*LAUNCHER, *program, str(config), "max_duration=5")
    assert done.returncode == 1
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, done.stderr
    assert "max_duration" in errors.pop()
    assert "Traceback" not in done.stderr + done.stdout


def test_two_processes_train_as_one(config: Path) -> None:
    """The same samples in every global batch, so the same losses but for the order of sums."""
    overrides = ("run_name=two", "autoresume=true")
    done = run(*LAUNCHER, SCRIPT, str(config), *overrides)
    assert done.returncode == 0, done.stderr
    assert "2 × cpu" in done.stdout
    folder = config.parent
    train(make_config(folder, folder / "data", "run_name=one", mohd="dense"))
    one, two = (read_metrics(folder / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        assert left["tokens"] == right["tokens"]
        assert left["tokens/cc"] == right["tokens/cc"]
        for key in ("loss/train/total", "metrics/eval/LanguageCrossEntropy"):
            assert (key in left) == (key in right)
            assert left.get(key, 0) == pytest.approx(right.get(key, 0), rel=2e-5)


def test_kill_and_resume_equals_uninterrupted(config: Path) -> None:
    folder, overrides = (
        config.parent,
        ("max_duration=30ba", "save_interval=3ba", "autoresume=true", "data.num_workers=1"),
    )
    command = [sys.executable, SCRIPT, str(config), str(ROOT / "configs/mohd/x2.yaml"), "run_name=killed", *overrides]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "runs" / "killed" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while len(read_metrics(metrics)) < 8 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 8 <= len(read_metrics(metrics)) < 30
    for name in ("killed", "whole"):
        train(make_config(folder, folder / "data", f"run_name={name}", *overrides, "data.num_workers=0"))
    assert_same_run(folder / "runs" / "whole", folder / "runs" / "killed", "ep1-ba30-rank0.pt")
