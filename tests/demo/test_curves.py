"""The picture of the loss curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mohd_train.demo.curves import TRAIN, VALIDATION, draw, read_curve, smooth
from mohd_train.errors import UserError


def write(run: Path, rows: list[dict]) -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_draw(tmp_path: Path) -> None:
    rows = [
        {"batch": i, "tokens": 512 * i, TRAIN: 8.0 / i} | ({VALIDATION: 100.0 / i} if i % 5 == 0 else {})
        for i in range(1, 21)
    ]
    curves = [read_curve(write(tmp_path / name, rows)) for name in ("tiny-dense", "tiny-x2")]
    assert curves[0].name == "tiny-dense"
    assert curves[0].validation_tokens == [2560, 5120, 7680, 10240]
    assert curves[1].perplexity[-1] == 5.0
    draw(curves, tmp_path / "out" / "curves.png")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]


def test_smooth() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 2.0], weight=0.5) == pytest.approx([1.0, 5 / 3])


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics.jsonl"):
        read_curve(tmp_path)
    with pytest.raises(UserError, match="has not trained a step"):
        read_curve(write(tmp_path / "empty", [{"batch": 0, "tokens": 0}]))
    (tmp_path / "empty" / "metrics.jsonl").write_text("{half\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_curve(tmp_path / "empty")
