"""What happens to a sweep when things go wrong around it."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fault_table import record
from sweep.sweep_support import request, starts

from mohd_train.errors import UserError
from mohd_train.sweep import folder as folders
from mohd_train.sweep.commands import Request, launch, resume, status
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch import local, worker
from mohd_train.sweep.status import run_status
from mohd_train.utils import processes

DENSE, X2, BARE = (f"tiny-355m-{setting}-s1" for setting in ("dense", "x2", "x2-no-fusion"))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL", 0.05)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def supervised() -> bool:
    """Whether a launch in this process has come to its runs: it handles the signals then."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.fault(
    "two `sweep.py launch` at once, SLURM", happened="both jobs are in the record, no run in two of them"
)
def test_two_launches_at_once(sweep_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    program(programs, "sbatch", f"sleep 1; echo . >> {tmp_path}/jobs; grep -c . {tmp_path}/jobs")  # 1, 2, ...
    program(programs, "squeue", "echo '0 PENDING'; echo '1 PENDING'")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    asked = request(sweep_file, data, launcher="slurm")
    both = [dataclasses.replace(asked, only=only) for only in (("dense", "x2"), ("x2", "x2-no-fusion"))]
    failed: list[BaseException] = []

    def start(one: Request) -> None:
        try:
            launch(one)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    launches = SweepFolder(sweep_file.parent / "out").record["launches"]
    assert sorted(one["job"] for one in launches) == ["1", "2"]
    assert sorted(name for one in launches for name in one["runs"]) == sorted([DENSE, X2, BARE])
    assert len({one["script"] for one in launches}) == 2
    record(lost=None)


@pytest.mark.fault("one broken run.json in a sweep", happened="its row says so; the others are shown and go on")
@pytest.mark.parametrize("content", ['{"status": "fin', "[]", "\0" * 64], ids=["cut", "no record", "zeros"])
def test_a_broken_run_json(
    sweep_file: Path, data: Path, stub: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    launch(request(sweep_file, data, only=("dense", "x2")))
    folder = SweepFolder(sweep_file.parent / "out")
    (folder.path / DENSE / "run.json").write_text(content)
    capsys.readouterr()
    assert status(Request(target=folder.path, once=True)) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{DENSE} unreadable" in shown
    assert f"{DENSE}/run.json" in shown.replace(" ", "")
    assert f"{X2} finished" in shown
    assert launch(request(sweep_file, data)) == 1  # the third run is trained; the first isn't whole
    assert starts(stub) == [DENSE, X2, BARE]
    assert f"{DENSE}: left alone: " in capsys.readouterr().out
    record(lost=None)


def test_a_broken_config_is_its_own_row_s_matter(sweep_file: Path, data: Path, stub: Path) -> None:
    launch(request(sweep_file, data, only=("dense", "x2")))
    folder = SweepFolder(sweep_file.parent / "out")
    folder.config_path(DENSE).write_text("{")
    assert [run_status(folder, name).state for name in (DENSE, X2)] == ["unreadable", "finished"]


@pytest.mark.fault(
    "kill -9 of a sweep's launcher",
    happened="its run goes on; the next launch waits for it, and starts no more beside it",
)
def test_runs_of_a_killed_launcher(
    sweep_file: Path, data: Path, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stub / "behave").write_text(f"{DENSE}=slow")
    asked = request(sweep_file, data, only=("dense", "x2"))
    launcher = multiprocessing.get_context("fork").Process(target=launch, args=(asked,))
    launcher.start()
    folder = SweepFolder(sweep_file.parent / "out")
    wait_for(lambda: starts(stub) == [DENSE])
    wait_for(lambda: worker.holder(folder, DENSE) is not None)
    assert launcher.pid is not None
    time.sleep(0.3)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.join()
    folder = SweepFolder(folder.path)
    found = worker.orphans(folder)
    assert list(found) == [DENSE]
    at_the_end: list[list[str]] = []

    def end_it() -> None:
        wait_for(supervised)
        time.sleep(0.5)  # ten looks: X2 would have been started
        at_the_end.append(starts(stub))
        os.killpg(found[DENSE].pid, signal.SIGTERM)

    killer = threading.Thread(target=end_it)
    killer.start()
    assert launch(asked) == 1  # the one that was ended didn't finish
    killer.join()
    assert at_the_end == [[DENSE]]  # one at a time
    assert starts(stub) == [DENSE, X2]
    said = capsys.readouterr().out
    assert (
        f"{DENSE} is still running from a launcher that was killed (process {found[DENSE].pid}); waiting for it" in said
    )
    (stub / "behave").unlink()
    assert resume(Request(target=folder.path)) == 0
    assert worker.orphans(SweepFolder(folder.path)) == {}
    record(lost=None)


def test_ctrl_c_ends_the_runs_of_a_killed_launcher_too(sweep_file: Path, data: Path, stub: Path) -> None:
    (stub / "behave").write_text(f"{DENSE}=slow")
    asked = request(sweep_file, data, only=("dense",))
    launcher = multiprocessing.get_context("fork").Process(target=launch, args=(asked,))
    launcher.start()
    folder = SweepFolder(sweep_file.parent / "out")
    wait_for(lambda: starts(stub) == [DENSE])
    wait_for(lambda: worker.holder(folder, DENSE) is not None)
    time.sleep(0.3)
    launcher.kill()
    launcher.join()

    def hang_up() -> None:
        wait_for(supervised)
        os.kill(os.getpid(), signal.SIGHUP)

    killer = threading.Thread(target=hang_up)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        launch(asked)
    killer.join()
    folder = SweepFolder(folder.path)
    assert not folder.run_lock(DENSE).held()
    assert run_status(folder, DENSE).state == "stopped"


@pytest.mark.fault(
    "the disk is full while a sweep runs", happened="the runs that can go on do; what isn't written is named"
)
def test_a_full_disk_while_runs_train(
    sweep_file: Path, data: Path, stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(worker, "write_atomic", full)
    assert launch(request(sweep_file, data, only=("dense", "x2"))) == 0
    assert starts(stub) == [DENSE, X2]
    assert f"{DENSE}: its exit code 0 can't be recorded ([Errno 28] No space left" in capsys.readouterr().out
    record(lost=None)


@pytest.mark.fault("the disk is full when SLURM has taken a sweep's job", happened="the job's id is in the error")
def test_a_full_disk_after_sbatch(
    sweep_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "sbatch", "echo 4711")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    write = folders.write_json

    def full(path: Path, value: dict[str, Any]) -> None:
        if value["launches"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, value)

    monkeypatch.setattr(folders, "write_json", full)
    with pytest.raises(UserError, match=r"SLURM took the runs as job 4711, but .*scancel 4711, make room"):
        launch(request(sweep_file, data, launcher="slurm"))
    stored = json.loads((sweep_file.parent / "out" / "sweep.json").read_text())
    assert stored["launches"] == []  # whole, as before
    record(lost=None)


def test_without_a_terminal_a_line_comes_now_and_then(
    sweep_file: Path, data: Path, stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "LINE", 0.1)
    (stub / "behave").write_text(f"{DENSE}=slow")
    asked = request(sweep_file, data, only=("dense", "x2"))

    def end_it() -> None:
        wait_for(supervised)
        wait_for(lambda: worker.holder(folder, DENSE) and (folder.path / DENSE / "run.json").exists())
        time.sleep(0.5)
        found = worker.holder(folder, DENSE)
        assert found is not None
        os.killpg(found.pid, signal.SIGTERM)

    folder = SweepFolder(sweep_file.parent / "out")
    killer = threading.Thread(target=end_it)
    killer.start()
    assert launch(asked) == 1
    killer.join()
    said = capsys.readouterr().out
    assert f"0 of 2 finished · {DENSE} batch 1/2, loss 3.5000" in said
