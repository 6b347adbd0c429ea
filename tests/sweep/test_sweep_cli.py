from __future__ import annotations

from pathlib import Path

import pytest

from mohd_train.cli import sweep
from mohd_train.sweep.commands import Request


def parse(line: str) -> tuple[str, Request]:
    return sweep.parse(line.split(), "mohd sweep")


@pytest.mark.parametrize(
    "line",
    [
        "launch f.yaml a.b=1 c=2 --only x2 *dense* --seeds 1 2 --scale tiny",
        "launch f.yaml --only x2 *dense* a.b=1 --seeds 1 2 c=2 --scale tiny",
        "launch --scale tiny f.yaml a.b=1 --only x2 *dense* --seeds 1 2 c=2",
    ],
)
def test_overrides_may_stand_anywhere(line: str) -> None:
    command, request = parse(line)
    assert command == "launch"
    assert (request.target, request.only, request.seeds) == (Path("f.yaml"), ("x2", "*dense*"), (1, 2))
    assert sorted(request.overrides) == ["a.b=1", "c=2"]
    assert request.scale == "tiny"


def test_defaults() -> None:
    command, request = parse("list")
    assert (command, request) == ("list", Request())


@pytest.mark.parametrize(
    "line", ["", "lunch f.yaml", "launch f.yaml --seeds x", "launch f.yaml --parallel 0", "launch f --scale big"]
)
def test_usage_errors(line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 2
