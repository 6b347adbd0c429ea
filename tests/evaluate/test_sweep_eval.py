"""The evaluation of a whole sweep: its commands, its processes, its command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.sweep_results import make_sweep

from mohd_train.errors import UserError
from mohd_train.evaluate import options, sweep_eval
from mohd_train.evaluate.sweep_eval import commands, run_sweep
from mohd_train.utils.environment import verb_command


def test_sweep_evaluation_commands(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", "table4", lambda s, seed: {"x2": 10.0, "dense": -9.0}.get(s), only=("x2", "dense")
    )
    asked = options.parse(None, ["--sweep", str(folder.path), "--perplexity", "--limit", "3", "--jobs", "2"])
    assert isinstance(asked, options.SweepEvalOptions)
    assert (asked.jobs, asked.arguments) == (2, ["--perplexity", "--limit", "3"])
    found = commands(folder, asked.arguments)
    assert list(found) == ["tiny-355m-x2-s1"]
    words = found["tiny-355m-x2-s1"]
    one = options.parse(None, words[len(verb_command("eval")) :])
    assert isinstance(one, options.PerplexityOptions)
    assert (one.name, one.data, one.limit) == ("tiny-355m-x2-s1", Path("data"), 3)
    assert one.output == folder.path / "eval"
    other = make_sweep(tmp_path / "t", "table4", lambda s, seed: None, only=("x2",))
    with pytest.raises(UserError, match="has no finished run"):
        run_sweep(options.SweepEvalOptions(other.path, 1, []))


def test_sweep_evaluation_gives_each_job_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two GPUs, four runs: never two at once on one, one that fails does not stop the others."""
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0)
    names = list(folder.runs)[:4]
    log = tmp_path / "used"
    program = (
        "import os, sys, time, pathlib; gpu = os.environ['CUDA_VISIBLE_DEVICES']; lock = pathlib.Path(sys.argv[1] + gpu);"
        "lock.mkdir(); time.sleep(0.3); lock.rmdir(); open(sys.argv[1], 'a').write(gpu + '\\n');"
        "sys.exit('error: out of rows' if sys.argv[2] == 'fail' else 0)"
    )
    asked = {name: [sys.executable, "-c", program, str(log), "fail" if name == names[0] else "go"] for name in names}
    monkeypatch.setattr(sweep_eval, "commands", lambda folder, words: dict(asked))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert run_sweep(options.SweepEvalOptions(folder.path, None, [])) == 1  # one a GPU without --jobs
    assert sorted(set(log.read_text().split())) == ["3", "5"]
    assert len(log.read_text().split()) == 4
    shown = capsys.readouterr().out
    assert f"{names[0]}: failed: error: out of rows" in shown
    assert shown.count(": evaluated") == 3
    log.unlink()
    assert run_sweep(options.SweepEvalOptions(folder.path, 1, [])) == 1
    assert log.read_text().split() == ["3"] * 4
    with pytest.raises(UserError, match="and there are 2"):
        run_sweep(options.SweepEvalOptions(folder.path, 3, []))


@pytest.mark.parametrize(
    "words",
    [["--jobs", "2"], ["--sweep", "d", "--name", "x"], ["--sweep", "d", "--jobs", "0"], ["--sweep", "d", "--nonsense"]],
)
def test_sweep_evaluation_usage_errors(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options.parse(None, words)
    assert caught.value.code == 2
