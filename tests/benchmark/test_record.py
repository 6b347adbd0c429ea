"""The benchmark of record: its parts, that one that fails stops no other, and that no result overwrites another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mohd_train.benchmark import peers
from mohd_train.benchmark import record as recording
from mohd_train.benchmark.cases import read_plan
from mohd_train.benchmark.run import _workload
from mohd_train.cli.benchmark import add_arguments
from mohd_train.errors import UserError

FIXED = ("--rounds", "2", "--no-compile", "--tokens", "32", "--threads", "1")


def test_every_part_is_a_command_that_can_be_read(root: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for parts in (*recording.PARTS.values(), *recording.PEERS.values()):
        for words in parts.values():
            arguments = parser.parse_args(["--device", "cpu", *words])
            for name in arguments.models.split(","):
                read = peers.plan_of if peers.is_peer(name) else read_plan
                assert read(name, _workload(arguments))
    wanted = {f"355m:{kind}" for kind in ("50", "75", "x2", "x3", "x4")} | {
        f"1.13b:{kind}" for kind in ("50", "x2", "x4")
    }
    trained = [parser.parse_args(words) for name, words in recording.PARTS["cuda"].items() if "train" in name]
    for kernels in ("grouped", "triton"):
        models = [part.models.split(",") for part in trained if part.kernels == kernels]
        assert {name for names in models for name in names} == wanted


def test_a_part_that_fails_stops_no_other_and_nothing_is_overwritten(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {"bad": ("--models", "tiny:none"), "good": ("--models", "tiny:x2", "--mode", "layer", *FIXED)}
    monkeypatch.setitem(recording.PARTS, "cpu", parts)
    monkeypatch.setattr(recording, "hardware", lambda kind: {"device": "A Machine (R) 9"})
    for _ in range(2):
        assert recording.record(tmp_path, "cpu") == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "failed: bad (exit 1)" in said
    files = sorted(file.name.partition("a-machine")[2] for file in tmp_path.iterdir())
    assert files == ["-9-good-2.json", "-9-good-2.png", "-9-good.json", "-9-good.png"]
    for file in tmp_path.glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        assert [row["model"] for row in result["rows"]] == ["tiny:dense", "tiny:x2"]
        assert result["environment"]["command"].endswith(" ".join(("--device", "cpu", *parts["good"])))


def test_a_folder_that_can_not_be_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--record .*file"):
        recording.record(tmp_path / "file", "cpu")
