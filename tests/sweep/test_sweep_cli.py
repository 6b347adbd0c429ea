from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from mohd_train.sweep.commands import Request


def parse(root: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> tuple[str, Request]:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *line.split()])
    return runpy.run_path(str(root / "scripts" / "sweep.py"))["_parse"]()


@pytest.mark.parametrize(
    "line",
    [
        "launch f.yaml a.b=1 c=2 --only x2 *dense* --seeds 1 2 --scale tiny",
        "launch f.yaml --only x2 *dense* a.b=1 --seeds 1 2 c=2 --scale tiny",
        "launch --scale tiny f.yaml a.b=1 --only x2 *dense* --seeds 1 2 c=2",
    ],
)
def test_overrides_may_stand_anywhere(root: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    command, request = parse(root, monkeypatch, line)
    assert command == "launch"
    assert (request.target, request.only, request.seeds) == (Path("f.yaml"), ("x2", "*dense*"), (1, 2))
    assert sorted(request.overrides) == ["a.b=1", "c=2"]
    assert request.scale == "tiny"


def test_defaults(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, request = parse(root, monkeypatch, "list")
    assert (command, request) == ("list", Request())


@pytest.mark.parametrize(
    "line", ["", "lunch f.yaml", "launch f.yaml --seeds x", "launch f.yaml --parallel 0", "launch f --scale big"]
)
def test_usage_errors(root: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(root, monkeypatch, line)
    assert caught.value.code == 2
