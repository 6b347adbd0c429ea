"""The first measurements on a GPU: every run has a valid config, the time limit holds, partial results are kept, and a second call
continues."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from train.train_support import make_data

from mohd_train.benchmark import first_gpu
from mohd_train.benchmark.first_gpu import METRICS, Part
from mohd_train.cli import main
from mohd_train.config.load import load_config
from mohd_train.errors import UserError

WRITES = "import json, pathlib, time; file = pathlib.Path({file!r}); rows = [{{'model': 'a', 'ratio_median': 1.5, 'mfu': 0.25}}]; "
WRITES += "file.write_text(json.dumps({{'rows': rows}})); "


def part(folder: Path, name: str, code: str = "", least: float = 0) -> Part:
    file = f"{name}.json"
    return Part(name, [sys.executable, "-c", WRITES.format(file=str(folder / file)) + code], least, file)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_run_has_a_config(tmp_path: Path, device: str) -> None:
    data = make_data(tmp_path / "data")
    found = first_gpu.parts(tmp_path, device, data)
    assert len({part.name for part in found}) == len({part.result for part in found}) == len(found)
    runs = [part for part in found if part.config]
    assert len(runs) == 4
    for run in runs:
        args = [run.config, run.command[run.command.index("train") + 1 :]]
        assert list(args[0]) == args[1]
        config = load_config(
            [word for word in run.config if "=" not in word], [word for word in run.config if "=" in word]
        )
        assert Path(config.run_folder) / METRICS == tmp_path / run.result
    assert [part.name for part in found if part.name == "study"] == ["study"]
    assert not [part for part in first_gpu.parts(tmp_path, device, None) if part.name == "study"]


def test_the_time_is_kept_and_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_gpu, "GRACE", 0.2)
    folder = tmp_path / "out"
    todo = [
        part(folder, "good"),
        part(folder, "bad", "raise SystemExit('out of luck')"),
        part(folder, "endless", "time.sleep(60)"),
        part(folder, "late", least=1),
    ]
    monkeypatch.setattr(first_gpu, "parts", lambda *_: todo)
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"parts": {}}))
    assert first_gpu.run(folder, 4 / 60, "cpu", None) == 1
    found = json.loads((folder / "summary.json").read_text())["parts"]
    assert {name: entry["state"] for name, entry in found.items()} == {
        "good": "done", "bad": "failed", "endless": "cut off", "late": "left out",
    }  # fmt: skip
    assert found["bad"]["why"] == "exit 1: out of luck; logs/bad.log"
    assert found["endless"]["found"] == found["good"]["found"] == {"a": {"ratio_median": 1.5, "mfu": 0.25}}
    assert "| endless | cut off |" in (folder / "summary.md").read_text()
    began = (folder / "good.json").stat().st_mtime_ns

    todo[1:3] = [part(folder, "bad"), part(folder, "endless")]
    assert first_gpu.run(folder, 1, "cpu", None) == 0
    assert (folder / "good.json").stat().st_mtime_ns == began
    found = json.loads((folder / "summary.json").read_text())["parts"]
    assert {entry["state"] for entry in found.values()} == {"done"}


def test_what_is_no_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is not JSON"):
        main(["benchmark", "--first-gpu", str(tmp_path), "--device", "cpu"])
