from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from sweep.sweep_support import SMALL, request, starts

from mohd_train.errors import UserError
from mohd_train.sweep.commands import Request, launch, list_sweeps, resume, run, show, status
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch import local
from mohd_train.sweep.status import run_status
from mohd_train.utils import processes
from mohd_train.utils.processes import Supervisor

DENSE, X2, BARE = (f"tiny-355m-{setting}-s1" for setting in ("dense", "x2", "x2-no-fusion"))


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL", 0.05)


def test_one_after_another_then_nothing_to_do(
    sweep_file: Path, data: Path, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(request(sweep_file, data)) == 0
    assert starts(stub) == [DENSE, X2, BARE]
    assert launch(request(sweep_file, data)) == 0
    assert starts(stub) == [DENSE, X2, BARE]
    assert "nothing to start" in capsys.readouterr().out
    folder = SweepFolder(sweep_file.parent / "out")
    assert {run_status(folder, name).state for name in folder.runs} == {"finished"}
    assert folder.runs[BARE]["label"] == "x2-no-fusion"
    assert folder.config(BARE)["mohd"]["fusion"] == "none"
    assert folder.config(BARE)["model"]["vocab_size"] == 64
    assert folder.config(BARE)["data"]["domains"].keys() == {"cc", "wiki"}


def test_a_failure_does_not_stop_the_others_and_resume_goes_on_with_it(
    sweep_file: Path, data: Path, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stub / "behave").write_text(f"{DENSE}=fail {X2}=vanish")
    assert launch(request(sweep_file, data)) == 1
    assert starts(stub) == [DENSE, X2, BARE]
    said = capsys.readouterr().out
    assert f"failed: {DENSE}: RuntimeError: out of luck" in said
    folder = SweepFolder(sweep_file.parent / "out")
    assert [run_status(folder, name).state for name in (DENSE, X2, BARE)] == ["failed", "failed", "finished"]
    (stub / "behave").unlink()
    assert resume(Request(target=sweep_file, out=folder.path)) == 0  # scale, data and overrides are remembered
    assert starts(stub)[3:] == [DENSE, X2]
    assert status(Request(target=folder.path)) == 0


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGINT])
def test_parallel_runs_share_the_cores_and_end_with_their_launcher(
    sweep_file: Path, data: Path, stub: Path, monkeypatch: pytest.MonkeyPatch, notice: signal.Signals
) -> None:
    """Ctrl-C too, though the import of Composer makes of it an exit that no `except KeyboardInterrupt` sees."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (stub / "behave").write_text(f"{DENSE}=slow {X2}=slow")
    folder = SweepFolder(sweep_file.parent / "out")

    def interrupt() -> None:
        wait_for(lambda: set(starts(stub)) == {DENSE, X2})
        time.sleep(0.5)
        os.kill(os.getpid(), notice)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        launch(request(sweep_file, data, parallel=2))
    killer.join()
    assert {line.split()[1] for line in (stub / "starts").read_text().splitlines()} == {"4"}
    assert [run_status(folder, name).state for name in (DENSE, X2)] == ["stopped", "stopped"]
    assert not folder.run_lock(DENSE).held()


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert local.slots(2, 2, on_cpu=False) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,5"}]
    with pytest.raises(UserError, match=r"3 run\(s\) at once on 2 GPU\(s\) each need 6, and there are 4"):
        local.slots(2, 3, on_cpu=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = local.slots(1, 6, on_cpu=False, share_gpus=True)  # small models: more runs than GPUs
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["0", "1", "2", "5", "0", "1"]
    with pytest.raises(UserError, match="lower --processes or --parallel"):
        local.slots(2, 3, on_cpu=False, share_gpus=True)  # a GPU takes one process of a run
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(local.slots(1, 2, on_cpu=False)) == 2


def test_a_run_under_way_is_left_alone(
    sweep_file: Path, data: Path, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SweepFolder(sweep_file.parent / "out")
    lock = folder.run_lock(DENSE)
    assert lock.take()
    assert launch(request(sweep_file, data, only=("dense", "x2"))) == 0
    lock.release()
    assert starts(stub) == [X2]
    assert f"{DENSE}: under way already" in capsys.readouterr().out


def test_the_lock_outlives_the_launcher(sweep_file: Path, data: Path, stub: Path) -> None:
    folder = SweepFolder(sweep_file.parent / "out")
    from mohd_train.sweep.launch.worker import run_job

    (stub / "behave").write_text(f"{DENSE}=fail")
    launch(request(sweep_file, data, only=("dense",)))
    (stub / "behave").write_text(f"{DENSE}=slow")
    codes: list[int] = []
    job = run_job(SweepFolder(folder.path), DENSE, 1, lambda command, code: codes.append(code))
    with contextlib.suppress(KeyboardInterrupt), Supervisor() as supervisor:
        supervisor.start(job, {})
        wait_for(lambda: len(starts(stub)) == 2)
        assert folder.run_lock(DENSE).held()  # by the run: this process has let it go
        with pytest.raises(UserError, match="is being trained by another process"):
            supervisor.start(job, {})
        time.sleep(0.3)
        raise KeyboardInterrupt
    assert codes == [0]
    assert not folder.run_lock(DENSE).held()


def test_an_edited_config_is_refused_for_a_run_that_has_begun(sweep_file: Path, data: Path, stub: Path) -> None:
    (stub / "behave").write_text(f"{X2}=fail")
    launch(request(sweep_file, data, only=("x2",)))
    with pytest.raises(
        UserError,
        match=r"out/tiny-355m-x2-s1 was started with another config \(optimizer.lr: 0.002 there, 0.1 here and 1 more\)",
    ):
        launch(request(sweep_file, data, overrides=(*SMALL, "optimizer.lr=0.1")))
    assert starts(stub) == [X2]
    # what decides nothing may change
    assert launch(request(sweep_file, data, only=("x2",), overrides=(*SMALL, "save_interval=2ba"))) == 0
    sweep_file.write_text(sweep_file.read_text().replace("fusion: none", "fusion: monarch"))  # a run that has not begun
    assert launch(request(sweep_file, data)) == 0
    with pytest.raises(UserError, match="launched with --scale tiny, not paper"):
        launch(request(sweep_file, data, scale="paper", overrides=()))


def test_more_seeds_join_a_launched_sweep(sweep_file: Path, data: Path, stub: Path) -> None:
    launch(request(sweep_file, data, only=("dense",)))
    launch(request(sweep_file, data, only=("dense",), seeds=(2,)))
    assert starts(stub) == [DENSE, "tiny-355m-dense-s2"]
    assert list(SweepFolder(sweep_file.parent / "out").runs) == starts(stub)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "which data"),
        ({"data": "nowhere"}, "no data folder nowhere"),
        ({"raw": "x"}, "give one or the other"),
        ({"data": None, "raw": "x"}, "go together"),
        ({"overrides": ()}, "samples of 16 tokens, the model takes max_seq_len=256"),
        ({"scale": "paper"}, "lacks c4-rp, github"),
        ({"submit_args": "--partition=x"}, "--submit-args is for --launcher slurm or k8s"),
    ],
)
def test_bad_input_before_anything_is_started(
    sweep_file: Path, data: Path, stub: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        launch(dataclasses.replace(request(sweep_file, data), **changes))
    assert starts(stub) == []


def test_resume_and_status_need_a_launched_sweep(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="small has not been launched in runs/sweep/small or runs/sweep/small-tiny"):
        status(Request(target=sweep_file))
    with pytest.raises(UserError, match="which sweep"):
        resume(Request())


def test_run_one(sweep_file: Path, data: Path, stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stub / "behave").write_text(f"{DENSE}=fail")
    launch(request(sweep_file, data, only=("dense",)))
    out = sweep_file.parent / "out"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert run(Request(target=out, only=(DENSE,))) == 0
        assert run(Request(target=out, only=(DENSE,))) == 0
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert starts(stub) == [DENSE, DENSE]
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no run 'other'"):
        run(Request(target=out, only=("other",)))


def test_show_prints_commands_that_train_takes(
    sweep_file: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    from mohd_train.config.load import load_config, split_arguments

    show(request(sweep_file, data))
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("composer")]
    assert len(commands) == 3
    words = shlex.split(commands[2])
    assert words[:4] == ["composer", "-n", "1", "scripts/train.py"]
    assert load_config(*split_arguments(words[4:])).mohd.fusion == "none"


def test_list_counts_the_data_s_vocabulary(
    sweep_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list_sweeps(Request(target=sweep_file, scale="small", only=("dense",)))
    said = capsys.readouterr().out
    assert "vocabulary 1,024" in said  # what the scale is meant for, where there is no data yet
    assert "1.016M" in said
    list_sweeps(request(sweep_file, data, scale="small", only=("dense",), overrides=()))
    said = capsys.readouterr().out
    assert "vocabulary 64 (of the data)" in said
    assert "0.770M" in said  # 753,664 of the blocks and 2 x 64 x 128
    list_sweeps(Request(target=sweep_file, only=("dense",)))
    assert "vocabulary 32,000" in capsys.readouterr().out
    with pytest.raises(UserError, match="no data folder"):
        launch(request(sweep_file, tmp_path / "none", scale="small"))


def test_trains_for_real(sweep_file: Path, data: Path, root: Path) -> None:
    """Two batches through the real command line: launched, looked at, launched again."""
    import sys

    out = sweep_file.parent / "out"
    command = [sys.executable, str(root / "scripts" / "sweep.py")]
    words = [str(sweep_file), *SMALL, "--scale", "tiny", "--data", str(data), "--out", str(out), "--only", "x2"]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    first = subprocess.run([*command, "launch", *words], capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"{X2} finished in" in first.stdout
    found = run_status(SweepFolder(out), X2)
    assert (found.state, found.batch, found.batches) == ("finished", 2, 2)
    assert found.perplexity is not None
    assert found.loss is not None
