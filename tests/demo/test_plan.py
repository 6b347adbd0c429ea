"""Which steps a demo runs, on states of its folder; how a step is shown, logged and fails."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mohd_train.config.load import load_config
from mohd_train.demo import plan, run, state
from mohd_train.demo.plan import Options, Step, claim, steps
from mohd_train.errors import UserError


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Iterator[Path]:
    """An empty place with the configs, and it is where we are."""
    (tmp_path / "configs").symlink_to(root / "configs")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def step(name: str, script: str, done: str | None = None) -> Step:
    return Step(name, f"the {name}", ("python", "-c", script), lambda: done)


def test_the_default_demo(root: Path) -> None:
    found = steps(Options())
    assert [step.name for step in found] == [
        "corpus",
        "tokenizer",
        "shards",
        *(f"train-tiny-{setting}" for setting in plan.SETTINGS),
        *(f"eval-tiny-{setting}" for setting in plan.SETTINGS),
        "table",
        "curves",
    ]
    for one in found:  # every script and config that a command names is there
        files = [word for word in one.command if word.startswith(("scripts/", "data_prep/", "eval/", "configs/"))]
        assert files
        assert all((root / file).exists() for file in files), one.line
    assert found[3].line == (
        "composer -n 1 scripts/train.py configs/recipe/demo.yaml configs/model/tiny.yaml configs/mohd/dense.yaml"
    )


def test_own_data_leaves_out_what_it_replaces() -> None:
    options = Options(raw="rows", tokenizer="llama.model", eval_data="questions", out="runs/real")
    found = {step.name: step.line for step in steps(options)}
    assert "corpus" not in found
    assert "tokenizer" not in found
    assert "--raw rows" in found["shards"]
    assert "--tokenizer llama.model" in found["shards"]
    assert found["train-tiny-x2"].endswith("configs/mohd/x2.yaml runs/real/recipe.yaml")
    assert f"--data-dir questions --limit {plan.REAL_LIMIT}" in found["eval-tiny-50"]
    with_limit = {step.name: step.line for step in steps(replace(options, limit=3))}
    assert "--limit 3" in with_limit["eval-tiny-50"]


def test_the_demo_recipe_fits_every_setting(checkout: Path) -> None:
    for setting in plan.SETTINGS:
        config = load_config(plan.recipe_files(Options(), setting))
        assert config.run_folder == f"runs/demo/tiny-{setting}"
        assert config.autoresume
        assert config.max_seq_len == plan.SEQ_LEN


def test_nothing_is_done_in_an_empty_folder(checkout: Path) -> None:
    found = steps(Options())
    assert [one.done() for one in found] == [None] * len(found)
    assert [one.under_way() for one in found] == [None] * len(found)


def test_a_folder_belongs_to_one_demo(tmp_path: Path) -> None:
    options = Options(out=str(tmp_path / "out"))
    claim(options)
    claim(options)
    with pytest.raises(UserError, match="holds a demo with raw = None, not 'rows'"):
        claim(replace(options, raw="rows"))
    (tmp_path / "out" / "demo.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        claim(options)


def test_an_unfinished_run_is_not_reused(checkout: Path) -> None:
    folder = Path("runs/demo/tiny-x2")
    (folder / "checkpoints").mkdir(parents=True)
    config = load_config(plan.recipe_files(Options(), "x2"))
    record = {"config": json.loads(json.dumps(config, default=vars)), "status": "running", "batch": 50}
    (folder / "run.json").write_text(json.dumps(record))
    assert state.run(config) is None
    assert state.progress(str(folder)) == "from its checkpoint at batch 50"
    record["status"] = "finished"
    (folder / "run.json").write_text(json.dumps(record))
    assert state.run(config) is None  # its checkpoint is gone
    state.checkpoint_of(str(folder)).write_bytes(b"weights")
    assert state.run(config) is not None
    config.optimizer.lr *= 2
    assert state.run(config) is None  # another config: train.py says what differs


def test_steps_that_are_there_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, mark = tmp_path / "out", tmp_path / "ran"
    todo = [
        step("first", "raise SystemExit(3)", done="12 pieces"),
        step("table", f"open({str(mark)!r}, 'w'); print('hello')"),
    ]
    monkeypatch.setattr(run, "steps", lambda options: todo)
    run.run_demo(Options(out=str(out)))
    shown = capfd.readouterr().out
    assert "the first: there already (12 pieces)" in shown
    assert "[2/2] 0:0" in shown
    assert "hello" in shown
    assert mark.exists()
    assert (out / "logs" / "table.log").read_text().endswith("hello\n")
    assert shown.rstrip().endswith(f"figure  {out}/curves.png")


def test_a_failing_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "steps", lambda options: [step("shards", "print('oh'); raise SystemExit(7)")])
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"step 1/1 \(the shards\) failed with exit code 7: `python -c .*logs/shards.log"
    ):
        run.run_demo(Options(out=str(out)))
    assert "oh" in (out / "logs" / "shards.log").read_text()


def test_success_without_output_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "steps", lambda options: [step("shards", "pass")])
    with pytest.raises(UserError, match="left no whole output although"):
        run.run_demo(Options(out=str(tmp_path / "out")))


def test_one_demo_at_a_time(tmp_path: Path) -> None:
    options = Options(out=str(tmp_path / "out"))
    refused = pytest.raises(UserError, match="another demo, or a step of one that was killed, is running")
    with run._claimed(options), refused, run._claimed(options):
        pass
    with run._claimed(options) as lock:  # free again
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    with refused, run._claimed(options):
        pass
    orphan.kill()
    orphan.wait()
    with run._claimed(options):
        pass


def test_the_log_keeps_the_last_state_of_a_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        code = run._tee([os.sys.executable, "-c", "print('10%\\r50%\\r\\x1b[1m100%\\x1b[0m\\nend', end='')"], file)
    assert code == 0
    assert log.read_text() == "100%\nend\n"
