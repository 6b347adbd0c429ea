"""Whole runs in this process: what they write, that they repeat bit for bit, go on exactly, and refuse what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from train.train_support import SEQ_LEN, make_config

from mohd_train import checkpoint
from mohd_train.config.load import load_config
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train import train as build
from mohd_train.train.train import dry_run, train

TIMED = ("time/", "throughput/")


class Stop(Callback):
    """Ends a run in the middle of a batch, as a crash would."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def after_backward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.batch:
            raise RuntimeError("crash of the test")


def crash(config: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``config`` until it crashes in the batch after ``batch``."""
    whole = build.build_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_callbacks", lambda *args: [*whole(*args), Stop(batch)])
        with pytest.raises(RuntimeError, match="crash of the test"):
            train(config)


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in read_metrics(path)]


def assert_same_run(one: Path, two: Path, last: str = "ep0-ba6-rank0.pt") -> None:
    """Losses, learning rates, mix, routing and validation of every batch, and the final weights, bit for bit."""
    assert timeless(one / "metrics.jsonl") == timeless(two / "metrics.jsonl")
    weights = [checkpoint.open(folder / "checkpoints" / last).tensors() for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_a_run_writes(finished: Path) -> None:
    folder = finished / "runs" / "a"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert (record["batch"], record["tokens"]) == (6, 6 * 8 * SEQ_LEN)
    assert record["plan"]["attention"] == {"sub_dims": 8, "top_k": 4, "shared": 3, "width": 4}
    assert record["data"]["sha256"]
    assert record["versions"]["mosaicml"]
    assert record["checkpoint"].endswith("ep0-ba6-rank0.pt")
    assert record["metrics"]["metrics/eval/LanguageCrossEntropy"] > 0
    found = checkpoint.open(folder / "checkpoints" / "latest-rank0.pt")
    metadata, weights = found.metadata, found.tensors()
    assert metadata["plan"] == record["plan"]
    assert metadata["tokenizer_sha256"] == "ab" * 32
    assert "embedding.weight" in weights
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    again = load_config([str(folder / "config.yaml")])
    assert again.run_name == "a"
    assert sorted(path.name for path in (folder / "checkpoints").glob("ep*")) == [
        "ep0-ba2-rank0.pt",
        "ep0-ba4-rank0.pt",
        "ep0-ba6-rank0.pt",
    ]


def test_what_a_run_logs(finished: Path) -> None:
    lines = read_metrics(finished / "runs" / "a" / "metrics.jsonl")
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        total = line["loss/train/cross_entropy"] + line["loss/train/balance"]
        assert line["loss/train/total"] == pytest.approx(total, rel=1e-5)
        assert ("metrics/cc/LanguagePerplexity" in line) == (line["batch"] % 3 == 0)
        assert ("routing/layer0/attention/entropy" in line) == (line["batch"] % 2 == 0)
    assert lines[-1]["tokens/cc"] == 3 * lines[-1]["tokens/wiki"]
    # 8 cc and 6 wiki samples are validated: every one counts once, though batches of 4 leave a short one
    last = lines[-1]
    cc, wiki = (last[f"metrics/{name}/LanguageCrossEntropy"] for name in ("cc", "wiki"))
    assert last["metrics/eval/LanguageCrossEntropy"] == pytest.approx((8 * cc + 6 * wiki) / 14, rel=1e-5)
    assert last["lr-DecoupledAdamW/group0"] > 0


def test_model_learns(tmp_path: Path, data: Path) -> None:
    train(make_config(tmp_path, data, "run_name=a", "max_duration=40ba", "eval_interval=40ba", "optimizer.lr=0.01"))
    lines = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert lines[-1]["loss/train/cross_entropy"] < lines[0]["loss/train/cross_entropy"] - 1
    assert lines[-1]["metrics/eval/LanguageCrossEntropy"] < 3.2


def test_same_seed_same_run(finished: Path, data: Path) -> None:
    train(make_config(finished, data, "run_name=b"))
    assert_same_run(finished / "runs" / "a", finished / "runs" / "b")
    train(make_config(finished, data, "run_name=other-seed", "seed=18"))
    lines = [timeless(finished / "runs" / name / "metrics.jsonl") for name in ("a", "other-seed")]
    assert lines[0] != lines[1]


@pytest.mark.parametrize("mohd", ["x2", "dense", "moe-x2"])
def test_crash_and_resume_twice_equals_uninterrupted(
    mohd: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 batches an epoch: the second crash lies past an epoch's end."""
    long = ("max_duration=22ba", "save_interval=4ba", "eval_interval=7ba", "autoresume=true", "eval_first=true")
    train(make_config(tmp_path, data, "run_name=whole", *long, mohd=mohd))
    crashed = make_config(tmp_path, data, "run_name=crashed", *long, mohd=mohd)
    crash(crashed, 7, monkeypatch)
    record = json.loads((tmp_path / "runs" / "crashed" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "crash of the test" in record["error"]
    assert len(read_metrics(tmp_path / "runs" / "crashed" / "metrics.jsonl")) == 8  # with the one before training
    crash(crashed, 18, monkeypatch)
    train(crashed)
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "crashed", "ep1-ba22-rank0.pt")
    record = json.loads((tmp_path / "runs" / "crashed" / "run.json").read_text())
    assert [bool(session["from"]) for session in record["sessions"]] == [False, True, True]
    kernels = "dense" if mohd == "dense" else "grouped"
    assert {(session["kernels"], session["loss"]) for session in record["sessions"]} == {(kernels, "chunked")}
    assert record["status"] == "finished"


def test_half_written_checkpoint_is_skipped_by_name(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    config = make_config(tmp_path, data, "run_name=a", "autoresume=true", "save_num_checkpoints_to_keep=2")
    crash(config, 5, monkeypatch)
    folder = tmp_path / "runs" / "a" / "checkpoints"
    newest = folder / "ep0-ba4-rank0.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    os.unlink(folder / "latest-rank0.pt")  # and the link was being replaced
    train(config)
    out = capsys.readouterr().out
    assert f"skipped a broken checkpoint: {newest} is broken or half-written" in out
    assert "resuming from" in out
    assert "ep0-ba2-rank0.pt, batch 2" in out
    assert_same_run(finished / "runs" / "a", tmp_path / "runs" / "a")
    assert sorted(path.name for path in folder.glob("ep*")) == ["ep0-ba4-rank0.pt", "ep0-ba6-rank0.pt"]


def test_a_checkpoint_is_written_after_the_line_of_its_batch(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that is killed in between goes on without the line, validation of that batch included."""
    config = make_config(tmp_path, data, "run_name=a", "eval_interval=2ba")
    seen: list[dict[str, Any]] = []
    save = CheckpointSaver._save_checkpoint

    def look(self: CheckpointSaver, state: State, logger: Logger) -> None:
        seen.append(
            read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")[-1] | {"saved": state.timestamp.batch.value}
        )
        save(self, state, logger)

    monkeypatch.setattr(CheckpointSaver, "_save_checkpoint", look)
    train(config)
    assert [line["saved"] for line in seen] == [2, 4, 6]
    for line in seen:
        assert line["batch"] == line["saved"]
        assert "metrics/eval/LanguageCrossEntropy" in line


def test_finished_run_is_left_alone(finished: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "runs" / "a" / "run.json").read_text()
    train(make_config(finished, data, "run_name=a", "autoresume=true"))
    assert "already finished" in capsys.readouterr().out
    assert (finished / "runs" / "a" / "run.json").read_text() == before


def test_save_overwrite_starts_over(finished: Path, data: Path) -> None:
    train(make_config(finished, data, "run_name=over", "max_duration=4ba"))
    train(make_config(finished, data, "run_name=over", "max_duration=3ba", "save_overwrite=true"))
    assert len(read_metrics(finished / "runs" / "over" / "metrics.jsonl")) == 3
    assert not (finished / "runs" / "over" / "checkpoints" / "ep0-ba4-rank0.pt").exists()


def test_weights_of_another_run_are_loaded(finished: Path, data: Path) -> None:
    source = finished / "runs" / "a" / "checkpoints" / "ep0-ba6-rank0.pt"
    config = make_config(
        finished, data, "run_name=from-a", f"load_path={source}", "load_weights_only=true", "optimizer.lr=1.0e-30"
    )
    train(config)
    theirs, ours = (checkpoint.open(path).tensors() for path in (source, Path(config.save_folder) / "latest-rank0.pt"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_microbatches_do_not_change_the_loss(finished: Path, data: Path) -> None:
    """Of a dense model; the balance loss is a mean over a microbatch by definition."""
    for size in (2, 8):
        name = f"micro-{size}"
        train(make_config(finished, data, f"run_name={name}", f"device_train_microbatch_size={size}", mohd="dense"))
    one, two = (read_metrics(finished / "runs" / f"micro-{size}" / "metrics.jsonl") for size in (2, 8))
    for left, right in zip(one, two, strict=True):
        assert left["loss/train/total"] == pytest.approx(right["loss/train/total"], rel=1e-5)


@pytest.mark.parametrize("duration", ["2ep", "240sp", "3840tok", "30ba"])
def test_length_in_any_unit(duration: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(make_config(tmp_path, data, f"max_duration={duration}", "scheduler.t_warmup=0.1dur"))
    out = capsys.readouterr().out
    assert "30 batches × 8 samples × 16 tokens = 3.84k tokens" in out
    assert "nothing was written" in out
    assert not (tmp_path / "runs").exists()
