"""``metrics.jsonl``: one line a batch, never two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mohd_train.errors import UserError
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.callbacks.metrics_file import MetricsFile


def at(batch: int) -> SimpleNamespace:
    number = SimpleNamespace
    return number(timestamp=number(batch=number(value=batch), token=number(value=100 * batch)))


def written(path: Path, batches: int) -> MetricsFile:
    log = MetricsFile(path)
    log.after_load(at(0), None)
    for batch in range(1, batches + 1):
        log.log_metrics({"loss": torch.tensor(batch / 2), "time/batch": batch - 1}, step=batch - 1)
        log.batch_end(at(batch), None)
    return log


def test_a_line_a_batch(tmp_path: Path) -> None:
    written(tmp_path / "m.jsonl", 3)
    expected = [{"batch": n, "tokens": 100 * n, "loss": n / 2} for n in (1, 2, 3)]
    assert read_metrics(tmp_path / "m.jsonl") == expected


def test_resume_cuts_what_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 5)
    with path.open("a") as file:
        file.write('{"batch": 6, "lo')  # killed while writing
    log = MetricsFile(path)
    log.after_load(at(3), None)
    assert [record["batch"] for record in read_metrics(path)] == [1, 2, 3]
    log.log_metrics({"loss": 9.0})
    log.batch_end(at(4), None)
    assert [record["batch"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_what_comes_after_the_last_batch_joins_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = written(path, 2)
    log.log_metrics({"metrics/eval": 1.5})
    log.close(at(2), None)
    assert read_metrics(path)[-1] == {"batch": 2, "tokens": 200, "loss": 1.0, "metrics/eval": 1.5}
    log.log_metrics({"metrics/eval": 1, "loss": 1})  # shorter than what it replaces
    log.close(at(2), None)
    assert len(read_metrics(path)) == 2
    assert log.latest == {"batch": 2, "tokens": 200, "loss": 1, "metrics/eval": 1}


def test_who_reads_meanwhile_sees_whole_lines(tmp_path: Path) -> None:
    """As sweep's status does: a read in two parts, between which a validation joins the last line."""
    path = tmp_path / "m.jsonl"
    log = written(path, 2)
    with path.open("rb", buffering=0) as reader:
        content = reader.read(path.stat().st_size)
        log.log_metrics({"metrics/eval": 1.5})
        log.eval_after_all(at(2), None)
        content += reader.read()
    assert [json.loads(line)["batch"] for line in content.splitlines()] == [1, 2]


def test_killed_while_a_line_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    log = written(path, 2)
    before = path.read_bytes()
    log.log_metrics({"metrics/eval": 1.5})
    monkeypatch.setattr("os.replace", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        log.eval_after_all(at(2), None)
    assert path.read_bytes() == before
    monkeypatch.undo()
    MetricsFile(path).after_load(at(2), None)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["m.jsonl"]


def test_merging_right_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 3)
    log = MetricsFile(path)
    log.after_load(at(2), None)
    log.log_metrics({"extra": 1.0})
    log.eval_standalone_end(at(2), None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["batch"] for line in lines] == [1, 2]
    assert lines[-1]["extra"] == 1.0


def test_nothing_logged_writes_nothing(tmp_path: Path) -> None:
    log = written(tmp_path / "m.jsonl", 1)
    log.close(at(1), None)
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"batch": 1}\n"batch": 2}\n')
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: not JSON"):
        read_metrics(path)
