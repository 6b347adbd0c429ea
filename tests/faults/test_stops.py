"""SIGTERM, and two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.faults_support import At, batches_of, config_of, fails, inject, record_of, recovers
from support import fault_table
from train.train_support import ROOT

from mohd_train.errors import UserError
from mohd_train.train import train as run_module
from mohd_train.train.folder import RunLock
from mohd_train.train.train import train


def terminate(_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.fault("SIGTERM in a batch", happened="saved after that batch, exit 0")
def test_sigterm_in_a_batch(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, terminate))
        train(config_of(tmp_path, data))
    assert signal.getsignal(signal.SIGTERM) is before
    assert batches_of(tmp_path) == [2, 4, 5]
    record = record_of(tmp_path)
    assert (record["status"], record["batch"], record["error"]) == ("preempted", 5, None)
    recovers(tmp_path, data, whole)


@pytest.mark.fault("SIGHUP (ssh drops) or SIGUSR1 in a batch", happened="saved after that batch, exit 0")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_save_too(
    number: signal.Signals,
    tmp_path: Path,
    data: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, lambda _: os.kill(os.getpid(), number)))
        train(config_of(tmp_path, data))
    assert signal.getsignal(number) == before
    assert batches_of(tmp_path) == [2, 4, 5]
    assert record_of(tmp_path)["status"] == "preempted"
    assert f"stopped by {number.name}" in capsys.readouterr().out
    recovers(tmp_path, data, whole)


@pytest.mark.fault("Ctrl-C in a batch", happened="saved after that batch, exit 130")
def test_ctrl_c_saves_first(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, lambda _: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            train(config_of(tmp_path, data))
    assert batches_of(tmp_path) == [2, 4, 5]
    assert record_of(tmp_path)["status"] == "interrupted"
    recovers(tmp_path, data, whole)


@pytest.mark.fault("Ctrl-C twice", happened="stopped at once, resumes from the last checkpoint")
def test_a_second_ctrl_c_does_not_wait(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(_: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 5, twice))
        with pytest.raises(KeyboardInterrupt):
            train(config_of(tmp_path, data))
    assert batches_of(tmp_path) == [2, 4]
    assert record_of(tmp_path)["status"] == "interrupted"
    recovers(tmp_path, data, whole)


def test_nohup_stays_in_force(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            inject(patch, At("after_backward", 4, lambda _: os.kill(os.getpid(), signal.SIGHUP)))
            train(config_of(tmp_path, data))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert record_of(tmp_path)["status"] == "finished"


@pytest.mark.fault("SIGTERM in a validation", happened="validation cut, saved, done over by the next session")
def test_sigterm_in_a_validation(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        inject(patch, At("eval_batch_end", 3, terminate))
        train(config_of(tmp_path, data))
    assert batches_of(tmp_path) == [2, 3]
    assert record_of(tmp_path)["status"] == "preempted"
    recovers(tmp_path, data, whole)  # its metrics have the validation of batch 3


@pytest.mark.fault("SIGTERM in start-up", happened="exit 0 at once, folder free")
def test_sigterm_in_start_up(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_data", lambda *_: terminate(None))
        train(config_of(tmp_path, data))
    assert record_of(tmp_path)["status"] == "preempted"
    assert batches_of(tmp_path) == []
    recovers(tmp_path, data, whole)


@pytest.mark.fault("killed between the last checkpoint and the end", happened="nothing trained again, finished")
def test_kill_after_the_last_checkpoint(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object) -> None:
        raise RuntimeError("the machine goes")

    with monkeypatch.context() as patch:
        inject(patch, At("fit_end", 8, die))
        with pytest.raises(RuntimeError, match="the machine goes"):
            train(config_of(tmp_path, data))
    recovers(tmp_path, data, whole)


@pytest.mark.fault("a second run in the folder of a live one", happened="refused, names the process; the first goes on")
def test_a_live_run_keeps_its_folder(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, data)
    refusals = []

    def second(_: object) -> None:
        with pytest.raises(UserError, match=f"in use by a live run .process {os.getpid()} on") as caught:
            RunLock(Path(config.run_folder)).take()
        refusals.append(caught.value)

    with monkeypatch.context() as patch:
        inject(patch, At("batch_end", 4, second))
        train(config)
    assert len(refusals) == 1
    fault_table.measured_whole(tmp_path / "runs" / "a", 8)
    assert record_of(tmp_path)["status"] == "finished"
    lock = RunLock(Path(config.run_folder))
    lock.take()
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_folder).rglob("*")}
    fails(config_of(tmp_path, data, "max_duration=9ba"), "in use by a live run")
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_folder).rglob("*")} == before
    lock.release()


HOLDER = """
import os, sys, time
from pathlib import Path
from mohd_train.train.folder import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.fault("kill -9 of a run whose data workers live on", happened="the folder's lock is free at once")
def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path).take()
    holder.kill()
    holder.wait()
    os.kill(child, 0)  # alive
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    os.kill(child, signal.SIGKILL)
    fault_table.record(lost=None)
    holder.stdout.close()
