"""NaN, infinity, jumps, collapsed routers, running out of memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import State
from faults.faults_support import At, batches_of, config_of, fails, goes_on, inject, last_batch, record_of, recovers
from support import fault_table
from train.test_run import assert_same_run

from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.composer_model import MoHDComposerModel
from mohd_train.train.train import train


def spoil_loss(monkeypatch: pytest.MonkeyPatch, factor: float, calls: range) -> None:
    """Multiplies the cross entropy of these microbatches; two make a batch."""
    theirs, count = MoHDComposerModel.loss, [0]

    def loss(self: MoHDComposerModel, outputs: Any, batch: Any) -> dict[str, torch.Tensor]:
        found = theirs(self, outputs, batch)
        if count[0] in calls:
            found = {"total": found["total"] * factor, "cross_entropy": found["cross_entropy"] * factor} | {
                "balance": found["balance"]
            }
        count[0] += 1
        return found

    monkeypatch.setattr(MoHDComposerModel, "loss", loss)


@pytest.mark.fault("NaN or infinite loss", happened="stopped before the update; batch and checkpoint named")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_loss_stops(value: float, tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil_loss(patch, value, range(9, 10))
        text = fails(config_of(tmp_path, data), "batch 5: .* not a finite number")
    assert "ep0-ba4-rank0.pt" in text
    assert batches_of(tmp_path) == [2, 4]
    assert record_of(tmp_path)["status"] == "failed"
    recovers(tmp_path, data, whole)


@pytest.mark.fault("infinite gradient", happened="stopped before the update; batch and checkpoint named")
def test_bad_gradient_stops(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(state: State) -> None:
        next(p for p in state.model.parameters() if p.grad is not None).grad.flatten()[0] = math.inf

    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, spoil))
        fails(config_of(tmp_path, data), "batch 5: .* gradient is not a finite number")
    assert batches_of(tmp_path) == [2, 4]
    recovers(tmp_path, data, whole)


@pytest.mark.fault("NaN loss, nonfinite_loss=skip", happened="that update left out, counted and said")
def test_bad_loss_is_skipped(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, torch.Tensor] = {}

    def look(state: State) -> None:
        seen[state.timestamp.batch.value] = torch.cat([p.detach().flatten() for p in state.model.parameters()])

    spoil_loss(monkeypatch, math.nan, range(8, 9))
    inject(monkeypatch, *(At("batch_end", batch, look) for batch in (4, 5, 6)))
    train(config_of(tmp_path, data, "nonfinite_loss=skip"))
    assert torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[5], seen[6])
    assert torch.isfinite(seen[6]).all()
    record = record_of(tmp_path)
    assert record["status"] == "finished"
    assert [(entry["kind"], entry["batch"]) for entry in record["warnings"]] == [("nonfinite_loss", 4)]
    lines = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert [line.get("faults/skipped_batches") for line in lines][:6] == [None, None, None, None, 1, None]
    assert len(lines) == 8
    fault_table.record(lost=int(sum(line.get("faults/skipped_batches", 0) for line in lines)))


@pytest.mark.fault("NaN loss without end, nonfinite_loss=skip", happened="stopped after ten in a row")
def test_skipping_has_an_end(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, data, "nonfinite_loss=skip", "max_duration=20ba")
    with monkeypatch.context() as patch:
        spoil_loss(patch, math.nan, range(4, 1000))
        fails(config, "batch 13: .* 11th time in a row")
    before = last_batch(tmp_path)
    train(config)
    assert record_of(tmp_path)["status"] == "finished"
    fault_table.measured_resume(tmp_path / "runs" / "a", before)


@pytest.mark.fault("loss spike", happened="warned, in run.json too; goes on")
def test_a_loss_spike_is_told(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, 3.0, range(38, 40))
    goes_on(tmp_path, data, None, "max_duration=22ba", "save_interval=10ba", "eval_interval=22ba")
    record = record_of(tmp_path)
    assert [(entry["kind"], entry["batch"]) for entry in record["warnings"]] == [("loss_spike", 20)]


@pytest.mark.fault("router collapse", happened="warned once a sub-dimension, in run.json too; goes on")
def test_a_collapsed_router_is_told(tmp_path: Path, data: Path, whole: Path) -> None:
    """Any share counts as a collapse here: a real one takes longer than a test."""
    goes_on(tmp_path, data, whole, "router_collapse_share=1.0e-9", "router_collapse_time=4ba")
    warnings = record_of(tmp_path)["warnings"]
    assert {entry["kind"] for entry in warnings} == {"router_collapse"}
    names = [entry["text"].split(" is ")[0] for entry in warnings]
    assert len(names) == len(set(names)) > 0
    assert all(int(name.rsplit("/", 1)[1]) >= 3 for name in names)  # shared ones are always on
    assert {entry["batch"] for entry in warnings} <= {6, 8}


@pytest.mark.fault("router collapse, router_collapse=stop", happened="stopped, names layer and sub-dimension")
def test_a_collapsed_router_stops(tmp_path: Path, data: Path, whole: Path) -> None:
    options = ("router_collapse_share=1.0e-9", "router_collapse_time=2ba", "router_collapse=stop")
    fails(config_of(tmp_path, data, *options), r"batch 4: routing/layer\d/(attention|ffn)/share/\d is .* collapsed")
    assert batches_of(tmp_path) == [2]
    recovers(tmp_path, data, whole, "router_collapse=ignore")


@pytest.mark.fault("out of memory", happened="stopped with the microbatch to try; goes on with it")
def test_out_of_memory(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        inject(patch, At("after_forward", 5, run_out))
        text = fails(config_of(tmp_path, data), "out of memory; set device_train_microbatch_size=2 .it is 4., or auto")
    assert "ep0-ba4-rank0.pt" in text
    before = last_batch(tmp_path)
    train(config_of(tmp_path, data, "device_train_microbatch_size=2"))
    fault_table.measured_resume(tmp_path / "runs" / "a", before)
    assert record_of(tmp_path)["status"] == "finished"
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (whole, tmp_path / "runs" / "a")]
    for one, two in zip(*lines, strict=True):
        assert one["loss/train/cross_entropy"] == pytest.approx(two["loss/train/cross_entropy"], rel=1e-3)
    with pytest.raises(AssertionError):
        assert_same_run(
            whole, tmp_path / "runs" / "a", "ep0-ba8-rank0.pt"
        )  # the balance loss is a mean over a microbatch
