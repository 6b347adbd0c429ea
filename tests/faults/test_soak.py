"""A run of 2,000 batches that is killed at random until it is done. It must end bit for bit as one that nobody touched.

    make test-soak [KILLS=60]

Takes half an hour and more on two cores, nearly all of it start-ups, so it belongs to no other target.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from train.test_run import assert_same_run
from train.train_support import ROOT, make_data, write_config

from mohd_train.run_folder.metrics import read_metrics
from mohd_train.run_folder.record import read_record

BATCHES = 2000
OUTLIVED = 120  # seconds; Composer's launcher gives the ranks 30 of them
FAULTS = ("kill rank", "kill launcher", "kill worker", "kill all", "SIGTERM", "SIGHUP", "disk full")
OPTIONS = (
    f"max_duration={BATCHES}ba",
    "eval_interval=500ba",
    "save_interval=20ba",
    "save_num_checkpoints_to_keep=2",
    "data.num_workers=1",
    "autoresume=true",
    "device_train_microbatch_size=4",
    "routing_log_interval=50ba",
)
COMMAND = [sys.executable, "-m", "composer.cli", "-n", "2", str(ROOT / "scripts" / "train.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def start(config: Path, name: str, *, largest_file: int | None = None) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves it so
        if largest_file is not None:  # a checkpoint can't be written whole: what a full disk does to a save
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    words = [*COMMAND, str(config), str(ROOT / "configs" / "mohd" / "x2.yaml"), f"run_name={name}", *OPTIONS]
    with (config.parent / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            words, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True, preexec_fn=prepare
        )


def children(pid: int) -> list[int]:
    """Ranks of a launcher, data workers of a rank: those that run the script, and not Python's resource tracker."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "scripts/train.py" in line]


def strike(launcher: subprocess.Popen[bytes], fault: str, chance: random.Random) -> str:
    """Does it, and says what was done: where there is nobody to hit (no worker lives between two epochs), all are killed."""
    ranks = children(launcher.pid)
    workers = [worker for rank in ranks for worker in children(rank)]
    targets = {
        "kill rank": (signal.SIGKILL, ranks),
        "kill launcher": (signal.SIGKILL, [launcher.pid]),
        "kill worker": (signal.SIGKILL, workers),
        "SIGTERM": (signal.SIGTERM, ranks),
        "SIGHUP": (signal.SIGHUP, ranks),
    }
    if fault in targets and targets[fault][1]:
        number, pids = targets[fault]
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), number)
            return fault
    if fault != "disk full" and launcher.poll() is None:
        os.killpg(launcher.pid, signal.SIGKILL)
        return "kill all"
    return fault


def settle(launcher: subprocess.Popen[bytes]) -> None:
    """Waits for the whole process group, ranks that outlive their launcher too."""
    limit = time.monotonic() + OUTLIVED
    while time.monotonic() < limit:
        launcher.poll()
        try:
            os.killpg(launcher.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(launcher.pid, signal.SIGKILL)
    raise AssertionError(f"a process outlived its run by {OUTLIVED} seconds")


@pytest.mark.expensive
@pytest.mark.timeout(6 * 3600)
def test_a_run_that_is_killed_at_random_ends_as_an_untouched_one(tmp_path: Path) -> None:
    kills = int(os.environ.get("KILLS", "60"))
    config = write_config(tmp_path, make_data(tmp_path / "data", train=400))
    whole = start(config, "whole")
    assert whole.wait() == 0, (tmp_path / "whole.log").read_text()[-3000:]
    chance, done = random.Random(0), Counter[str]()
    folder, metrics = tmp_path / "runs" / "killed", tmp_path / "runs" / "killed" / "metrics.jsonl"
    while sum(done.values()) < kills:
        fault = chance.choice(FAULTS)
        begun = len(read_metrics(metrics))
        assert begun < BATCHES, f"finished after {sum(done.values())} of {kills} faults; raise BATCHES"
        launcher = start(config, "killed", largest_file=20_000 if fault == "disk full" else None)
        # Within reach of the next checkpoints, and seldom so far that the run ends before its faults do
        goal = begun + chance.randint(1, max(2, 2 * (BATCHES - begun) // (kills - sum(done.values()) + 1)))
        limit = time.monotonic() + 300
        while launcher.poll() is None and len(read_metrics(metrics)) < goal and time.monotonic() < limit:
            time.sleep(0.05)
        fault = strike(launcher, fault, chance)
        if fault == "disk full" and launcher.poll() is None:
            launcher.wait(300)
        settle(launcher)
        done[fault] += 1
        print(f"{sum(done.values())}/{kills} {fault}: batch {len(read_metrics(metrics))}", flush=True)
    last = start(config, "killed")
    assert last.wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]
    record = read_record(folder)
    assert record is not None
    assert record.data["status"] == "finished"
    print(f"{dict(done)}; {len(record.data['sessions'])} sessions")
    end = next((folder / "checkpoints").glob(f"ep*-ba{BATCHES}-rank0.pt")).name
    assert_same_run(tmp_path / "runs" / "whole", folder, end)
