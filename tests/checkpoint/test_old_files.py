"""Files that an earlier state of this project wrote (commit 96e0c63) are read: a checkpoint, a run folder, an export.

``old/`` is a run of the tests' small model that was stopped after batch 5 of 8, its checkpoint as a Hugging Face folder,
and logits that the code of that commit computed from it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from train.train_support import ROOT, make_data
from transformers import AutoModelForCausalLM

from mohd_train import checkpoint
from mohd_train.config.load import load_config
from mohd_train.hf.convert import load_native
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.train import train

OLD = ROOT / "tests" / "checkpoint" / "old"


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(OLD / "expected.pt", weights_only=True)
    return found


def test_a_checkpoint(expected: dict[str, torch.Tensor]) -> None:
    path = OLD / "runs" / "a" / "checkpoints" / "latest-rank0.pt"
    found = checkpoint.open(path).verify()
    assert (found.kind, found.metadata["run_name"]) == ("file", "a")
    assert found.plan is not None
    assert found.plan.scaling == "sum_to_active"  # it was called sum_preserving
    with torch.no_grad():
        torch.testing.assert_close(load_native(path)(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-6)


def test_an_export(expected: dict[str, torch.Tensor]) -> None:
    assert json.loads((OLD / "exported" / "config.json").read_text())["scaling"] == "sum_preserving"
    model = AutoModelForCausalLM.from_pretrained(OLD / "exported")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-6)


def test_a_run_folder_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own ``config.yaml``, to the end: what batch 5 logged before the stop, it logs again."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "runs", "runs", symlinks=True)
    make_data(Path("data"))
    before = read_metrics("runs/a/metrics.jsonl")
    train(load_config(["runs/a/config.yaml"]))
    record = json.loads(Path("runs/a/run.json").read_text())
    assert record["status"] == "finished"
    assert record["sessions"][1]["from"] == "runs/a/checkpoints/ep0-ba4-rank0.pt"
    after = read_metrics("runs/a/metrics.jsonl")
    assert [line["batch"] for line in after] == list(range(1, 9))
    assert after[:4] == before[:4]
    for key in ("loss/train/total", "loss/train/balance", "lr-DecoupledAdamW/group0"):
        assert after[4][key] == pytest.approx(before[4][key], rel=1e-5)
