"""The supervisor of processes: what it starts ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_table import record

from mohd_train.errors import UserError
from mohd_train.utils import processes
from mohd_train.utils.processes import Command, Job, SharedLock, Supervisor, free_slots, group_alive


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL", 0.02)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def python(script: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script)]


def job(name: str, script: str, folder: Path, codes: dict[str, int]) -> Job:
    def ended(command: Command, code: int) -> None:
        codes[name] = code

    return Job(name, lambda slot: Command(python(script), folder / f"{name}.log", environment=slot), ended)


def refuse(job: Job, error: UserError) -> None:
    raise AssertionError(error)


def test_at_most_one_job_in_a_slot_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    script = f"""
        import os, pathlib, sys, time
        place = pathlib.Path({str(tmp_path)!r}, os.environ["PLACE"])
        place.mkdir()  # fails if another is there
        time.sleep(0.1)
        place.rmdir()
        sys.exit(3 if "{{name}}" == "b" else 0)
    """
    codes: dict[str, int] = {}
    jobs = [job(name, script.replace("{name}", name), tmp_path, codes) for name in "abcde"]
    with Supervisor() as supervisor:
        supervisor.run_all(jobs, [{"PLACE": "one"}, {"PLACE": "two"}], refused=refuse)
    assert codes == {"a": 0, "b": 3, "c": 0, "d": 0, "e": 0}
    assert (tmp_path / "a.log").read_text().startswith(f"$ {sys.executable} -c ")


def test_a_job_that_cannot_start_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    codes: dict[str, int] = {}
    (tmp_path / "bad.log").mkdir()  # no file can be written there
    found: list[str] = []
    jobs = [job("bad", "", tmp_path, codes), job("good", "", tmp_path, codes)]
    with Supervisor() as supervisor:
        supervisor.run_all(jobs, [{}], refused=lambda job, error: found.append(f"{job.name}: {error}"))
    assert codes == {"good": 0}
    assert len(found) == 1
    assert found[0].startswith("bad: can't start `")


SAVES = """
    import pathlib, signal, sys, time
    def save(*_):
        time.sleep(0.3)
        pathlib.Path({saved!r}).touch()
        sys.exit(5)
    signal.signal(signal.SIGTERM, save)
    pathlib.Path({ready!r}).touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_commands_politely(tmp_path: Path, notice: signal.Signals) -> None:
    codes: dict[str, int] = {}
    script = SAVES.format(saved=str(tmp_path / "saved"), ready=str(tmp_path / "ready"))
    before = signal.getsignal(notice)

    def interrupt() -> None:
        if (tmp_path / "ready").exists():
            os.kill(os.getpid(), notice)

    def supervise() -> None:
        with Supervisor() as supervisor:
            supervisor.run_all([job("a", script, tmp_path, codes)], [{}], refused=refuse, look=interrupt)

    with pytest.raises(KeyboardInterrupt):
        supervise()
    assert (tmp_path / "saved").exists()
    assert codes == {"a": 5}  # told to the job, though stopped
    assert signal.getsignal(notice) is before


def test_what_ignores_the_notice_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    codes: dict[str, int] = {}
    script = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    """
    with contextlib.suppress(KeyboardInterrupt), Supervisor() as supervisor:
        supervisor.start(job("a", script, tmp_path, codes), {})
        wait_for((tmp_path / "ready").exists)
        raise KeyboardInterrupt
    assert codes == {"a": -signal.SIGKILL}


def test_a_stop_waits_for_the_ranks_of_a_launcher_that_died_at_once(tmp_path: Path) -> None:
    """Its ranks got the signal too, and are still saving."""
    rank = textwrap.dedent(SAVES.format(saved=str(tmp_path / "saved"), ready=str(tmp_path / "ready")))
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    codes: dict[str, int] = {}
    with contextlib.suppress(KeyboardInterrupt), Supervisor() as supervisor:
        command = supervisor.start(job("a", launcher, tmp_path, codes), {})
        wait_for((tmp_path / "ready").exists)
        raise KeyboardInterrupt
    assert (tmp_path / "saved").exists()
    assert not group_alive(command.pid)


def test_the_ranks_of_a_launcher_that_crashed_are_ended(tmp_path: Path) -> None:
    rank = f"import pathlib, time; pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    launcher = f"""
        import os, pathlib, subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {rank!r}])
        while not pathlib.Path({str(tmp_path / "ready")!r}).exists():
            time.sleep(0.02)
        os.kill(os.getpid(), 9)
    """
    codes: dict[str, int] = {}
    with Supervisor() as supervisor:
        command = supervisor.start(job("a", launcher, tmp_path, codes), {})
        wait_for(supervisor.collect)
    assert codes == {"a": -signal.SIGKILL}
    wait_for(lambda: not group_alive(command.pid))


@pytest.mark.fault("the terminal of a supervisor goes away", happened="it goes on, and its commands with it")
def test_output_that_fails_ends_nothing(tmp_path: Path, root: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from mohd_train.utils.processes import Command, Job, Supervisor
        words = [sys.executable, "-c", "import time; print(1); time.sleep(0.3); print(2)"]
        start = lambda slot: Command(words, Path({str(tmp_path / "log")!r}), echo=True)
        with Supervisor() as supervisor:
            job = Job("a", start, lambda command, code: print("ended"))
            supervisor.run(job, lambda command: print("x" * 9999, flush=True))
        Path({str(tmp_path / "done")!r}).touch()
    """
    process = subprocess.Popen(
        python(program), stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root / "src")}
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
    assert (tmp_path / "log").read_text().endswith("1\n2\n")
    record(lost=None)


def test_the_log_keeps_the_last_state_of_a_bar(tmp_path: Path) -> None:
    words = python(r"print('10%\r50%\r\x1b[1m100%\x1b[0m\nend', end='')")
    codes: list[int] = []
    echoed = Job(
        "a",
        lambda slot: Command(words, tmp_path / "log", echo=True, shown="bar"),
        lambda command, code: codes.append(code),
    )
    with Supervisor() as supervisor:
        supervisor.run(echoed)
    assert codes == [0]
    assert (tmp_path / "log").read_text() == "$ bar\n100%\nend\n"


def test_slots() -> None:
    gpus = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert free_slots(gpus, [gpus[1]]) == [gpus[0]]
    assert free_slots(gpus, [{"CUDA_VISIBLE_DEVICES": "1"}]) == [gpus[1]]  # started with other --processes
    assert free_slots(gpus, [{"CUDA_VISIBLE_DEVICES": "7"}]) == gpus
    assert free_slots([{}, {}], [{"OMP_NUM_THREADS": "2"}]) == [{}]
    assert free_slots([{}], [{}, {}]) == []


def test_looking_at_a_lock_is_not_holding_it(tmp_path: Path) -> None:
    """Somebody who watches must not be taken for the holder."""
    lock, done = SharedLock(tmp_path / "lock"), threading.Event()
    assert not lock.held()
    assert lock.take()
    assert SharedLock(lock.path).held()
    lock.release()

    def watch() -> None:
        while not done.is_set():
            SharedLock(lock.path).held()

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(200):
            assert lock.take()
            lock.release()
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()
