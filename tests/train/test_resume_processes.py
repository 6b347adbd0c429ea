"""Runs in two processes: they equal those in one, and go on exactly after kill -9 and SIGTERM, on as many processes or others."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from composer.utils import dist
from streaming.base.shared import prefix
from train.distributed_support import ENVIRONMENT, PROGRAM, Job, Place, in_processes, run, run_in, seen, start
from train.test_run import assert_same_run, timeless
from train.train_support import make_data

from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train import train as run_module
from mohd_train.train.callbacks import watchdog

BATCHES, EPOCH = 20, 15
LAST = f"ep1-ba{BATCHES}-rank0.pt"
BOUND = 60  # seconds from SIGTERM to the end
MODELS = ("x2", "dense")


class Folder(Place):
    """Where the runs of these tests lie."""

    fixed = (f"max_duration={BATCHES}ba", "save_interval=3ba", "eval_interval=5ba")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Uninterrupted runs of both models in one process (``x2-1``) and two (``x2-2``)."""
    made = Folder(tmp_path_factory.mktemp("processes"))
    make_data(made.path / "data")
    for mohd in MODELS:
        run(made.job(f"{mohd}-1", mohd))
    run_in(2, *(made.job(f"{mohd}-2", mohd) for mohd in MODELS))
    return made


def assert_equal_but_for_rounding(one: Path, two: Path) -> None:
    """The same samples in every global batch, and losses that differ by the order of sums alone."""
    left, right = seen(one), seen(two)
    assert list(left) == list(right) == list(range(BATCHES))
    assert {batch: sorted(rows) for batch, rows in left.items()} == {b: sorted(rows) for b, rows in right.items()}
    lines = [timeless(path / "metrics.jsonl") for path in (one, two)]
    assert [len(part) for part in lines] == [BATCHES, BATCHES]
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-7), (ours["batch"], key)


def test_samples_are_told_apart(folder: Folder) -> None:
    """Else the tests below would not see one skipped or repeated."""
    rows = [row for batch, part in seen(folder.run("x2-1")).items() if batch < EPOCH for row in part]
    assert len(set(rows)) > 0.7 * len(rows)  # the planned mix shows domain cc one and a half times an epoch


@pytest.mark.parametrize("mohd", MODELS)
def test_two_processes_equal_one(folder: Folder, mohd: str) -> None:
    assert_equal_but_for_rounding(folder.run(f"{mohd}-1"), folder.run(f"{mohd}-2"))


@pytest.mark.parametrize("mohd", MODELS)
def test_goes_on_in_another_number_of_processes(folder: Folder, mohd: str) -> None:
    """From one to two, and from two to one past the end of the epoch."""
    grown, shrunk = f"{mohd}-grown", f"{mohd}-shrunk"
    run(folder.job(grown, mohd, crash=7))
    run_in(2, folder.job(shrunk, mohd, crash=17), folder.job(grown, mohd, session=2))
    run(folder.job(shrunk, mohd, session=2))
    for name, before, after in ((grown, 1, 2), (shrunk, 2, 1)):
        record = json.loads((folder.run(name) / "run.json").read_text())
        assert [session["hardware"]["processes"] for session in record["sessions"]] == [before, after]
        assert record["sessions"][1]["from"]
        assert_equal_but_for_rounding(folder.run(f"{mohd}-1"), folder.run(name))


def test_processes_of_a_node_take_one_name(folder: Folder) -> None:
    """In shared memory, also where another run came or went between their looking for a free one."""
    theirs = prefix._check_and_find

    def as_seen(*args: Any, **keywords: Any) -> int:
        return theirs(*args, **keywords) + 1000 * dist.get_global_rank()

    with mock.patch.object(prefix, "_check_and_find", as_seen):
        run_in(2, folder.job("x2-named", "x2", "max_duration=1ba", "scheduler.t_warmup=0ba"))


def test_a_hang_of_one_process_is_told_by_each(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 never comes to where rank 0 waits for it: each says where it is, and both end with 1."""
    whole = run_module.build_data

    def hangs_on_rank_one(*args: Any) -> Any:
        if dist.get_global_rank() == 1:
            time.sleep(100)
        return whole(*args)

    monkeypatch.setattr(run_module, "build_data", hangs_on_rank_one)
    monkeypatch.setattr(watchdog, "REPORT_TIME", 2.0)
    job = folder.job("x2-hangs", "x2", "start_timeout=5")
    assert in_processes(lambda: run(job)) == [1, 1]
    logs, printed = folder.run("x2-hangs") / "logs", capfd.readouterr().err
    for rank, place in ((0, "build_train_loader"), (1, "hangs_on_rank_one")):
        assert f"error: rank {rank}: no batch after start_timeout=5 seconds" in printed
        stacks = (logs / f"rank{rank}.stacks.txt").read_text()
        assert f"in {place}" in stacks
        assert f"in {place}" in printed
        assert ("hangs_on_rank_one" in stacks) or rank == 0
    assert "sleep" not in (logs / "rank0.stacks.txt").read_text()


def test_a_run_without_workers_ends_when_a_shard_is_gone(folder: Folder, tmp_path: Path) -> None:
    """Threads of streaming wait for the shard for ever, and a process waits for its threads: it must end nevertheless."""
    data = shutil.copytree(folder.path / "data", tmp_path / "data")
    job = Job(
        str(tmp_path), str(data), ["run_name=a", "data.num_workers=0", "max_duration=40ba"], lose="cc/train/shard.*"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, PROGRAM, json.dumps([dataclasses.asdict(job)])],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "shard" in errors[0]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 100


def wait_for(batches: int, path: Path, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while len(read_metrics(path / "metrics.jsonl")) < batches and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    assert process.poll() is None


def in_group(group: int) -> list[int]:
    """Processes of a process group that are still there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def wait_until_gone(group: int, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while in_group(group) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not in_group(group)


def test_killed_and_stopped_runs_go_on_exactly(folder: Folder) -> None:
    """One run, with data workers: kill -9 of ``composer -n 2`` and all of its processes in a random batch; SIGTERM to the
    launcher, whose ranks then save; SIGTERM to one rank, and both save and end with 0; kill -9 past the end of the epoch; and on to
    the end, bit for bit as if nothing had been."""
    name, pick = "x2-killed", random.Random(7)
    path, workers = folder.run(name), "data.num_workers=1"
    first = start(folder.job(name, "x2", workers, kill=pick.randrange(4, 9)))
    assert first.wait(120) == -signal.SIGKILL
    wait_until_gone(first.pid, 10)

    second = start(folder.job(name, "x2", workers, session=2, slow=0.2))
    wait_for(len(read_metrics(path / "metrics.jsonl")) + 1, path, second)
    begun = time.monotonic()
    second.send_signal(signal.SIGTERM)
    second.wait(BOUND)
    wait_until_gone(second.pid, BOUND)
    assert time.monotonic() - begun < BOUND
    assert_saved(path)

    stopped = len(read_metrics(path / "metrics.jsonl")) + 1
    run_in(2, folder.job(name, "x2", workers, session=3, stop=stopped))
    assert_saved(path, stopped + 1)
    killed = folder.job(name, "x2", workers, session=4, kill=pick.randrange(EPOCH + 1, BATCHES))
    assert in_processes(lambda: run(killed)) == [-signal.SIGKILL] * 2
    run_in(2, folder.job(name, "x2", workers, session=5))
    assert_same_run(folder.run("x2-2"), path, LAST)
    assert seen(path) == seen(folder.run("x2-2"))


def assert_saved(path: Path, batch: int | None = None) -> None:
    """The run was stopped, and no batch of it was lost."""
    record, done = json.loads((path / "run.json").read_text()), len(read_metrics(path / "metrics.jsonl"))
    assert record["status"] == "preempted"
    assert record["checkpoint"].endswith(f"ba{done}-rank0.pt")
    assert done == (batch or done)
