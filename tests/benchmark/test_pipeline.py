"""What a run, a preparation and a start cost beside the model's own arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from train.train_support import make_data

from mohd_train.benchmark import loop, preparation, startup
from mohd_train.cli import main
from mohd_train.demo.tokenizer import train_tokenizer
from mohd_train.errors import UserError
from mohd_train.train import registry

SMALL = [
    "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=2", "model.head_dim=8",
]  # fmt: skip


def test_the_loop_is_timed_on_the_runs_own_batches(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    found = loop.measure(data, SMALL, rounds=3, each=2)
    assert len(found["ratios"]) == 3
    assert found["seconds_a_batch"] > 0
    assert found["seconds_a_batch_bare"] > 0
    assert 0 <= found["data_share"] < 1
    assert "beside_bare_loop" not in registry.CALLBACKS


def test_a_start_is_timed_until_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that is timed passes its checks on whatever data there is."""
    commands: list[list[str]] = []
    monkeypatch.setattr(startup, "_seconds", lambda command, until: float(len(commands.append(command) or commands)))
    found = startup.measure(make_data(tmp_path / "data"), rounds=2)
    assert [row["name"] for row in found] == ["libraries", "this package", "checks (--dry-run)", "first batch"]
    assert [(row["first"], row["again"]) for row in found] == [(1, 7), (2, 8), (3, 9), (4, 10)]
    dry = commands[2]
    assert main(dry[dry.index("train") :]) is None
    assert commands[3] == dry[:-1]


def test_a_start_ends_with_the_first_batch_and_a_failure_is_told(tmp_path: Path) -> None:
    file, python = tmp_path / "metrics.jsonl", [sys.executable, "-c"]
    writes = f"import time, pathlib; time.sleep(0.1); pathlib.Path({str(file)!r}).write_text('x'); time.sleep(1)"
    assert 0.1 < startup._seconds([*python, writes], file) < 1.0
    with pytest.raises(UserError, match="out of luck"):
        startup._seconds([*python, "raise SystemExit('out of luck')"], None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "loop"], "--mode loop needs --data"),
        (["--mode", "start", "--data", "nowhere"], "--mode start needs --data: nowhere is not a folder"),
        (["--mode", "prepare", "--raw", "."], "--mode prepare needs --tokenizer"),
    ],
)
def test_what_a_mode_needs_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["benchmark", *words])


def test_a_peer_tokenizes_the_same_rows(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "cc"
    raw.mkdir(parents=True)
    rows = [json.dumps({"text": f"document {number} " + "of some words " * 400}) for number in range(20)]
    (raw / "cc.jsonl").write_text("\n".join(rows) + "\n")
    train_tokenizer((json.loads(row)["text"] for row in rows), tmp_path / "pieces.model", vocab_size=300)
    found = {row["name"]: row for row in preparation.measure(tmp_path / "raw", tmp_path / "pieces.model", 1, 1)}
    assert {"mohd prepare", "datasets.map"} <= set(found)
    assert found["mohd prepare"]["ratio"] == 1.0
    assert all(row["processor_seconds"] > 0 and row["largest_process_mb"] > 50 for row in found.values())
