from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from sweep.sweep_support import request

from mohd_train.sweep.commands import Request, launch
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.status import last_error, render, run_status

NAME = "tiny-355m-dense-s1"


@pytest.fixture
def folder(sweep_file: Path, data: Path, stub: Path) -> SweepFolder:
    """A launched sweep of one run, whose records the tests rewrite."""
    launch(request(sweep_file, data, only=("dense",), overrides=("max_seq_len=16", "max_duration=10ba", "device=cpu")))
    return SweepFolder(sweep_file.parent / "out")


def write(folder: SweepFolder, record: dict | None, lines: list[dict], exit_code: int | None = None) -> None:
    run = folder.path / NAME
    (run / "run.json").unlink(missing_ok=True)
    if record is not None:
        (run / "run.json").write_text(json.dumps({"config": folder.config(NAME)} | record))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.exit_path(NAME).unlink(missing_ok=True)
    if exit_code is not None:
        folder.exit_path(NAME).write_text(f"{exit_code}\n")


LINES = [{"batch": b, "loss/train/cross_entropy": 5 - b, "time/total": b / 36} for b in range(1, 5)]


def test_states(folder: SweepFolder) -> None:
    write(folder, {"status": "finished"}, LINES)
    assert run_status(folder, NAME).state == "finished"
    write(folder, {"status": "running"}, LINES)
    assert run_status(folder, NAME).state == "killed"
    assert run_status(folder, NAME, "queued").state == "queued"
    assert run_status(folder, NAME, "running").state == "running"
    lock = folder.run_lock(NAME)
    assert lock.take()
    assert run_status(folder, NAME).state == "running"
    write(folder, None, [])
    assert run_status(folder, NAME).state == "starting"
    lock.release()
    write(folder, {"status": "interrupted"}, LINES, 130)
    assert run_status(folder, NAME).state == "stopped"
    write(folder, {"status": "preempted"}, LINES, 0)
    assert run_status(folder, NAME).state == "stopped"
    write(folder, {"status": "failed", "error": "RuntimeError: bad"}, LINES, 1)
    assert (run_status(folder, NAME).state, run_status(folder, NAME).error) == ("failed", "RuntimeError: bad")
    write(folder, None, [], 1)
    folder.log_path(NAME).write_text("$ python train.py\nerror: no data folder\n")
    assert (run_status(folder, NAME).state, run_status(folder, NAME).error) == ("failed", "error: no data folder")
    write(folder, None, [])
    folder.log_path(NAME).unlink()
    assert run_status(folder, NAME).state == "waiting"


def test_progress_and_time_left(folder: SweepFolder) -> None:
    validated = {**LINES[1], "metrics/eval/LanguagePerplexity": 12.5}
    write(folder, {"status": "running"}, [LINES[0], validated, *LINES[2:]])
    found = run_status(folder, NAME, "running")
    assert (found.batch, found.batches, found.loss, found.perplexity) == (4, 10, 1, 12.5)
    assert found.seconds == pytest.approx(400)
    assert found.left == pytest.approx(600)  # 6 batches at 100 s
    console = Console(width=170, record=True)
    console.print(render("t", [found]))
    text = console.export_text()
    assert "4/10" in text
    assert "10m 00s" in text
    assert "12.5" in text


def test_a_half_written_last_line_is_passed_over(folder: SweepFolder) -> None:
    write(folder, {"status": "running"}, LINES)
    with (folder.path / NAME / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 5, "loss/tr')
    assert run_status(folder, NAME, "running").batch == 4


def test_last_error_is_of_the_last_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("$ one\nValueError: old\n$ two\nstep 1\ntorch.OutOfMemoryError: 3 GiB\nleft over line\n")
    assert last_error(log) == "torch.OutOfMemoryError: 3 GiB"
    log.write_text("$ one\nValueError: old\n$ two\nKilled\n")
    assert last_error(log) == "Killed"
    assert last_error(tmp_path / "none") is None


def test_status_command_says_by_its_code(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    from mohd_train.sweep.commands import status

    assert status(Request(target=folder.path)) == 0
    write(folder, {"status": "failed", "error": "RuntimeError: bad"}, LINES, 1)
    assert status(Request(target=folder.path)) == 1
    assert "RuntimeError: bad" in capsys.readouterr().out
