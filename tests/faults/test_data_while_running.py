"""Data that breaks after the check at the start, and workers that die or hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from composer.core import State
from faults.conftest import LONG
from faults.faults_support import At, batches_of, config_of, fails, inject, record_of, recovers

from mohd_train.data.datasets import TokenStreams
from mohd_train.train.callbacks import worker_watch


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Path:
    """A copy of the data that may be broken; nothing of it is unpacked."""
    return shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds", ".lock"))


def of_workers(number: int, *, last: bool = False) -> None:
    """Sends a signal to all data workers, or to the last one alone."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    assert workers
    for worker in sorted(workers, key=lambda child: child.pid or 0)[-1 if last else 0 :]:
        os.kill(worker.pid or 0, number)


@pytest.mark.fault("a data worker is killed", happened="stopped with one line, goes on from the checkpoint")
def test_a_worker_dies(tmp_path: Path, data: Path, long_whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_: State) -> None:
        of_workers(signal.SIGKILL)
        time.sleep(0.2)

    with monkeypatch.context() as patch:
        inject(patch, At("batch_start", 5, kill))
        text = fails(
            config_of(tmp_path, data, *LONG, "data.num_workers=1"), "a data worker died .*killed by signal: Killed"
        )
    assert "autoresume=true" in text
    assert not multiprocessing.active_children()
    recovers(tmp_path, data, long_whole, *LONG, "data.num_workers=1")


@pytest.mark.fault("a data worker hangs", happened="stopped after data.worker_timeout, worker ended")
def test_a_worker_hangs(tmp_path: Path, data: Path, long_whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, flag = TokenStreams.get_item, tmp_path / "hang"

    def get_item(self: TokenStreams, sample_id: int, retry: int = 7) -> dict[str, Any]:
        if flag.exists():
            time.sleep(100)
        return theirs(self, sample_id, retry)

    with monkeypatch.context() as patch:
        patch.setattr(TokenStreams, "get_item", get_item)
        inject(patch, At("batch_start", 5, lambda _: flag.touch()))
        options = (*LONG, "data.num_workers=1", "data.worker_timeout=1")
        fails(config_of(tmp_path, data, *options), "no batch came from the data workers within")
    assert not multiprocessing.active_children()
    flag.unlink()
    recovers(tmp_path, data, long_whole, *LONG, "data.num_workers=1")


@pytest.mark.fault("a data worker is frozen (SIGSTOP)", happened="stopped after data.worker_timeout, worker ended")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_is_frozen(
    workers: int, tmp_path: Path, data: Path, long_whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one, or one of two."""
    frozen_since: list[float] = []

    monkeypatch.setattr(worker_watch, "SLACK", 2.0)

    def freeze(_: State) -> None:
        frozen_since.append(time.monotonic())
        of_workers(signal.SIGSTOP, last=workers == 2)

    options = (*LONG, f"data.num_workers={workers}", "data.worker_timeout=2")
    with monkeypatch.context() as patch:
        inject(patch, At("batch_start", 5, freeze))
        fails(config_of(tmp_path, data, *options), "no batch came from the data workers within")
    assert time.monotonic() - frozen_since[0] < 30
    assert not multiprocessing.active_children()
    recovers(tmp_path, data, long_whole, *LONG, f"data.num_workers={workers}")


@pytest.mark.fault("a signal to the data workers too", happened="they work on until the run has saved")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_workers_outlive_signals(
    number: signal.Signals, tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler, a dropped ssh connection and Ctrl-C reach every process of a job."""

    def everywhere(_: State) -> None:
        of_workers(number)
        os.kill(os.getpid(), number)
        time.sleep(0.1)

    with monkeypatch.context() as patch:
        inject(patch, At("after_forward", 4, everywhere))
        from mohd_train.train.train import train

        with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
            train(config_of(tmp_path, data, "data.num_workers=1"))
    assert record_of(tmp_path)["status"] == ("interrupted" if number == signal.SIGINT else "preempted")
    assert batches_of(tmp_path)[-1] == 5
    recovers(tmp_path, data, whole, "data.num_workers=1")


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:10])
    else:
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])


@pytest.mark.fault(
    "unpacked shard breaks while running", happened="stopped, shard named; goes on once it is unpacked again"
)
@pytest.mark.parametrize("kind", ["removed", "truncated"])
@pytest.mark.parametrize("workers", [1])
def test_an_unpacked_shard_breaks(
    kind: str, workers: int, tmp_path: Path, data: Path, own: Path, long_whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[Path] = []

    def act(_: State) -> None:
        for path in (own / "cc" / "train").glob("shard.*.mds"):
            damage(path, kind)
            broken.append(path)
        for path in (own / "cc" / "train").glob("shard.*.zstd"):
            path.rename(path.with_name(f"away-{path.name}"))

    with monkeypatch.context() as patch:
        inject(patch, At("batch_end", 5, act))
        text = fails(
            config_of(tmp_path, own, *LONG, f"data.num_workers={workers}"),
            r"cc/train/shard\.\d+\.mds: can't be (read|fetched)",
        )
    assert "Traceback" not in text
    assert broken
    for path in (own / "cc" / "train").glob("away-*"):
        path.rename(path.with_name(path.name.removeprefix("away-")))
    for path in broken:
        path.unlink(missing_ok=True)
    recovers(tmp_path, own, long_whole, *LONG, f"data.num_workers={workers}")


@pytest.mark.fault(
    "packed shard breaks while running", happened="stopped, shard named; the epoch does not end in silence"
)
@pytest.mark.parametrize("kind", ["removed", "flipped"])
def test_a_packed_shard_breaks(
    kind: str, tmp_path: Path, own: Path, long_whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are unpacked just before they are needed here, so most of them still lie packed."""
    saved = shutil.copytree(own, tmp_path / "saved")

    def act(_: State) -> None:
        for path in (own / "cc" / "train").glob("shard.*.zstd"):
            damage(path, kind)

    with monkeypatch.context() as patch:
        inject(patch, At("fit_start", 0, act))
        text = fails(
            config_of(tmp_path, own, *LONG, "data.num_workers=1"), r"cc/train/shard\.\d+\.mds|a shard can't be fetched"
        )
    assert "shard." in text
    shutil.rmtree(own)
    shutil.copytree(saved, own)
    recovers(tmp_path, own, long_whole, *LONG)
