"""``compile: true`` through Composer."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from train.train_support import make_config

from mohd_train.model.checkpoint import read_checkpoint
from mohd_train.train.callbacks.metrics_file import read_metrics
from mohd_train.train.run import train


def test_a_compiled_run_equals_a_plain_one(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and weights, validation between, and checkpoints that a run without the compiler reads.

    All that Composer and torch.compile do, but for the last step: ``aot_eager`` runs the traced graphs without generating code.
    """
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for name in ("plain", "compiled"):
        compiled = str(name == "compiled").lower()
        train(make_config(tmp_path, data, f"run_name={name}", f"compile={compiled}", "max_duration=4ba"))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    plain, traced = (tmp_path / "runs" / name for name in ("plain", "compiled"))
    for left, right in zip(read_metrics(plain / "metrics.jsonl"), read_metrics(traced / "metrics.jsonl"), strict=True):
        for key in ("loss/train/total", "loss/train/balance", "metrics/eval/LanguageCrossEntropy"):
            assert (key in left) == (key in right)
            assert left.get(key, 0) == pytest.approx(right.get(key, 0), rel=1e-5)
    one, two = (read_checkpoint(next(run.glob("checkpoints/ep*-ba4-rank0.pt")))[1] for run in (plain, traced))
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
