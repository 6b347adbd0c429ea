"""Which steps a demo runs, on states of its folder; how a step is shown, logged and fails."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.fault_table import record as measured

from mohd_train.cli import VERBS
from mohd_train.config.load import load_config
from mohd_train.demo import commands, sequence
from mohd_train.demo.sequence import Options, Step, claim, run_demo, steps
from mohd_train.errors import UserError
from mohd_train.utils.processes import SharedLock


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Iterator[Path]:
    """An empty place with the configs, and it is where we are."""
    (tmp_path / "configs").symlink_to(root / "configs")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def step(name: str, script: str, leaves: Path = Path("/")) -> Step:
    return Step(name, f"the {name}", ("python", "-c", script), leaves)


def test_the_default_demo(root: Path) -> None:
    found = steps(Options())
    assert [step.name for step in found] == [
        "corpus",
        "tokenizer",
        "shards",
        *(f"train-tiny-{setting}" for setting in sequence.SETTINGS),
        *(f"eval-tiny-{setting}" for setting in sequence.SETTINGS),
        "table",
        "curves",
    ]
    for one in found:  # every verb and config that a command names is there
        assert one.command[0] in ("mohd", "composer")
        assert one.command[1] in VERBS or one.command[:6] == ("composer", "-n", "1", "-m", "mohd_train.cli", "train")
        files = [word for word in one.command if word.startswith(("eval/", "configs/"))]
        assert all((root / file).exists() for file in files), one.line
    assert found[3].line == (
        "composer -n 1 -m mohd_train.cli train configs/recipe/demo.yaml configs/model/tiny.yaml configs/mohd/dense.yaml"
    )


def test_own_data_leaves_out_what_it_replaces() -> None:
    options = Options(raw="rows", tokenizer="llama.model", eval_data="questions", out="runs/real")
    found = {step.name: step.line for step in steps(options)}
    assert "corpus" not in found
    assert "tokenizer" not in found
    assert "--raw rows" in found["shards"]
    assert "--tokenizer llama.model" in found["shards"]
    assert found["train-tiny-x2"].endswith("configs/mohd/x2.yaml runs/real/recipe.yaml")
    assert f"--data-dir questions --limit {sequence.REAL_LIMIT}" in found["eval-tiny-50"]
    with_limit = {step.name: step.line for step in steps(replace(options, limit=3))}
    assert "--limit 3" in with_limit["eval-tiny-50"]


def test_the_demo_recipe_fits_every_setting(checkout: Path) -> None:
    for setting in sequence.SETTINGS:
        config = load_config(sequence.recipe_files(Options(), setting))
        assert config.run_folder == f"runs/demo/tiny-{setting}"
        assert config.autoresume
        assert config.max_seq_len == sequence.SEQ_LEN


def test_a_folder_belongs_to_one_demo(tmp_path: Path) -> None:
    options = Options(out=str(tmp_path / "out"))
    claim(options)
    claim(options)
    with pytest.raises(UserError, match="holds a demo with raw = None, not 'rows'"):
        claim(replace(options, raw="rows"))
    (tmp_path / "out" / "demo.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        claim(options)


def test_every_step_is_printed_run_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    todo = [step("shards", "print('first')"), step("table", "print('hello')")]
    monkeypatch.setattr(sequence, "steps", lambda options: todo)
    run_demo(Options(out=str(out)))
    shown = capfd.readouterr().out
    assert "[1/2] 0:00 the shards\n$ python -c 'print('" in shown
    assert shown.index("first") < shown.index("[2/2]") < shown.index("hello")
    assert (out / "logs" / "table.log").read_text().endswith("hello\n")
    assert shown.rstrip().endswith(f"figure  {out}/curves.png")
    run_demo(Options(out=str(out)))  # the same again: each command decides what is left to do
    assert (out / "logs" / "table.log").read_text().count("hello") == 4  # the command's line, and what it printed


def test_a_second_corpus_is_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.corpus(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    commands.corpus(tmp_path)
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == before
    damaged = next(iter(before))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    commands.corpus(tmp_path)
    assert damaged.read_bytes() == whole


def test_a_failing_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "steps", lambda options: [step("shards", "print('oh'); raise SystemExit(7)")])
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"step 1/1 \(the shards\) failed with exit code 7: `python -c .*logs/shards.log"
    ):
        run_demo(Options(out=str(out)))
    assert "oh" in (out / "logs" / "shards.log").read_text()


def test_success_without_output_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "steps", lambda options: [step("shards", "pass", tmp_path / "none")])
    with pytest.raises(UserError, match=r"left no .*none although"):
        run_demo(Options(out=str(tmp_path / "out")))


def test_one_demo_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(out=str(tmp_path / "out"))
    monkeypatch.setattr(sequence, "steps", lambda options: [])
    refused = pytest.raises(UserError, match="another demo, or a step of one that was killed, is running")
    lock = SharedLock(tmp_path / "out" / ".lock")
    with lock.holding("busy"), refused:
        run_demo(options)
    run_demo(options)  # free again
    with lock.holding("busy") as descriptor:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    with refused:
        run_demo(options)
    orphan.kill()
    orphan.wait()
    run_demo(options)


@pytest.mark.fault("Ctrl-C in `make demo`", happened="the step saves and ends; no traceback; the next demo goes on")
def test_ctrl_c_on_a_terminal(tmp_path: Path, root: Path) -> None:
    """The demo on a terminal of its own, a launcher and its rank as the step: Ctrl-C reaches the demo alone."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import pathlib, signal, sys, time\n"
        f"def save(*_): time.sleep(0.5); pathlib.Path({str(tmp_path / 'saved')!r}).touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('50%', end='\\r', flush=True)\ntime.sleep(60)\n"
    )
    program = tmp_path / "demo.py"
    program.write_text(
        "from mohd_train.demo import sequence\nfrom mohd_train.demo.sequence import Options, Step, run_demo\n"
        "from mohd_train.errors import run_cli\nfrom pathlib import Path\n"
        f"command = ('composer', '-n', '1', {str(rank)!r})\n"
        "sequence.steps = lambda options: [Step('train', 'training', command, Path('/'))]\n"
        f"run_cli(lambda: run_demo(Options(out={str(tmp_path / 'out')!r})))\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(root / "src")
        os.execv(sys.executable, [sys.executable, str(program)])
    shown = b""
    while b"50%" not in shown:  # a bar: the step sees a terminal
        shown += os.read(terminal, 1 << 16)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # its end
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    text = shown.decode()
    assert "Traceback" not in text
    assert "interrupted: ending this step; run the demo again to resume" in text
    assert (tmp_path / "saved").exists()  # before the demo ended
    measured(lost=None)
