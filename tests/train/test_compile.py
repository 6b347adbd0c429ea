"""``compile: true`` through Composer."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from support.plans import small_plan
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from train.train_support import make_config

from mohd_train import checkpoint
from mohd_train.model.llama import Transformer
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.train import train


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
    one, two = (checkpoint.open(next(run.glob("checkpoints/ep*-ba4-rank0.pt"))).tensors() for run in (plain, traced))
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["x2", "dense"])
def test_recomputed_blocks_are_one_graph(setting: str) -> None:
    """Activation checkpointing within the compiled model: a block must give tensors alone, in plain tuples."""
    torch._dynamo.reset()
    counters.clear()
    plain, recomputed = (Transformer(small_plan(setting), seed=1) for _ in range(2))
    names = [name for name, _ in plain.named_parameters()]
    recomputed.blocks = torch.nn.ModuleList(checkpoint_wrapper(block) for block in recomputed.blocks)
    ids = torch.randint(97, (2, 16))
    losses = []
    for model in (plain, torch.compile(recomputed, backend="aot_eager", fullgraph=True)):
        out = model(ids, labels_BT=ids, logits=False)
        losses.append(out.cross_entropy + out.balance_loss)
        losses[-1].backward()
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for name, ours, theirs in zip(names, plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6, msg=name)
