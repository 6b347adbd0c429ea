"""Starts that share a machine: one that is stopped or hangs holds nobody up; shared memory that is too small is named."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import fault_table

from mohd_train.config.schema import DataConfig
from mohd_train.data import datasets
from mohd_train.data.manifest import load_manifest
from mohd_train.data.streaming import build_train_loader
from mohd_train.errors import UserError
from mohd_train.train import faults

Usage = namedtuple("Usage", "total used free")


def load(data: Path) -> Any:
    config = DataConfig(local=str(data), domains={"cc": 1.0}, num_workers=0)
    return build_train_loader(config, load_manifest(data), global_batch_size=8, device_batch_size=8, seed=1)


def start_and_freeze(data: Path, frozen: Any, stop: bool) -> None:
    """A start that is stopped, or sleeps, between looking for a free name in shared memory and taking it."""
    from streaming.base.shared import prefix

    theirs = prefix._check_and_find

    def find(*args: Any) -> int:
        found = theirs(*args)
        if not frozen.is_set():
            frozen.set()
            if stop:
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                time.sleep(8)
        return found

    prefix._check_and_find = find
    datasets._held = None
    assert len(next(iter(load(data)))["input_ids"]) == 8
    os._exit(0)


@pytest.fixture(params=[True, False], ids=["stopped", "slow"])
def other(request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Another start of this user, which is held up with the lock in its hands."""
    monkeypatch.setattr(datasets, "START_NOTICE", 0.5)
    monkeypatch.setattr(datasets, "START_PATIENCE", 1.0)
    context = multiprocessing.get_context("fork")
    frozen = context.Event()
    process = context.Process(target=start_and_freeze, args=(data, frozen, request.param))
    process.start()
    assert frozen.wait(60)
    time.sleep(0.3)
    yield process, request.param
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGCONT)
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


@pytest.mark.fault(
    "another start is stopped or hangs", happened="named after seconds; goes on beside it, which goes on too"
)
def test_a_start_that_hangs_holds_nobody_up(
    other: Any, tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process, stopped = other
    begin = time.monotonic()
    first = next(iter(load(data)))["input_ids"]
    assert time.monotonic() - begin < 7
    assert process.is_alive()
    said = capfd.readouterr().err
    assert f"process {process.pid} on " in said
    assert ("is stopped" in said) is stopped
    os.kill(process.pid, signal.SIGCONT)  # it takes the name that it had found; ours is another one
    process.join(60)
    assert process.exitcode == 0
    assert len(first) == 8
    fault_table.record(lost=None)


@pytest.mark.fault("/dev/shm is too small", happened="refused with its size and what is needed")
def test_little_shared_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 16, 0, 1 << 16))
    with pytest.raises(UserError, match=r"/dev/shm has 65\.5kB free, this run's data needs about .*--shm-size"):
        load(data)
    fault_table.record(lost=None)


@pytest.mark.fault("/dev/shm fills up while running", happened="stopped with one line that names it")
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible ..."),
    ],
    ids=["error", "signal"],
)
def test_shared_memory_fills_up(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 16, 1 << 16, 0))
    fault = faults.explain(error, 2, "ep0-ba4-rank0.pt")
    assert fault is not None
    assert "/dev/shm is full" in str(fault)
    assert "ep0-ba4-rank0.pt" in str(fault)
    fault_table.record(lost=None)
