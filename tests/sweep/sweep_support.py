"""A small sweep file, prepared data of a few samples, and a stand-in for training that takes no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from train.train_support import make_data

from mohd_train.sweep.commands import Request
from mohd_train.sweep.launch import worker

SWEEP = """
name: small
title: a small sweep
recipe: ablation_10b
seeds: [1]
runs:
  - models: [355m]
    settings: [dense, x2, {name: x2-no-fusion, base: x2, set: {mohd.fusion: none}}]
"""
SMALL = (
    "max_seq_len=16", "max_duration=2ba", "global_train_batch_size=4", "device_train_microbatch_size=4", "eval_interval=1ba",
    "save_interval=1ba", "eval_subset_num_batches=1", "device=cpu",
)  # fmt: skip

# What training leaves behind, by the run's name: FAIL fails at its first start, SLOW goes on until it is stopped.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
import yaml

config = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(config["run_folder"])
folder.mkdir(parents=True, exist_ok=True)
marks = Path({marks!r})
with (marks / "starts").open("a") as file:
    print(config["run_name"], os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)

def record(**values):
    (folder / "run.json").write_text(json.dumps({{"config": config, "batch": 1, **values}}))

with (folder / "metrics.jsonl").open("a") as file:
    line = {{"batch": 1, "loss/train/cross_entropy": 3.5, "time/total": 0.01, "metrics/eval/LanguagePerplexity": 33.0}}
    print(json.dumps(line), file=file)
record(status="running")
signal.signal(signal.SIGTERM, lambda *_: (record(status="preempted"), sys.exit(0)))
words = (marks / "behave").read_text().split() if (marks / "behave").exists() else []
behave = dict(word.split("=") for word in words)
what = behave.get(config["run_name"])
if what == "slow":
    time.sleep(60)
if what == "fail":
    (marks / "behave").write_text(" ".join(word for word in words if not word.startswith(config["run_name"])))
    record(status="failed", error="RuntimeError: out of luck")
    sys.exit("RuntimeError: out of luck")
if what == "vanish":
    os.kill(os.getpid(), signal.SIGKILL)
record(status="finished")
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with the domains cc and wiki."""
    return make_data(tmp_path_factory.mktemp("sweep-data") / "data")


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """The small sweep."""
    path = tmp_path / "small.yaml"
    path.write_text(SWEEP)
    return path


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trains by the stub. Returns the folder whose ``behave`` says how runs go, and whose ``starts`` says what was started."""
    marks = tmp_path / "marks"
    marks.mkdir()
    script = marks / "stub.py"
    script.write_text(STUB.format(marks=str(marks)))
    monkeypatch.setattr(worker, "train_command", lambda config, processes: [sys.executable, str(script), str(config)])
    return marks


def starts(marks: Path) -> list[str]:
    """Names of the runs that the stub was started for."""
    path = marks / "starts"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def request(sweep_file: Path, data: Path, **more: object) -> Request:
    """A launch at the tiny scale."""
    values: dict[str, object] = {
        "scale": "tiny",
        "data": str(data),
        "out": sweep_file.parent / "out",
        "overrides": SMALL,
        **more,
    }
    return Request(target=sweep_file, **values)  # type: ignore[arg-type]
