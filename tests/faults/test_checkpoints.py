"""Checkpoints that are missing, corrupt, another run's, or not worth resuming from."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.faults_support import At, batches_of, config_of, fails, inject, record_of, recovers
from support import fault_table
from train.train_support import make_config

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_native
from mohd_train.hf.export import export
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.train import dry_run, train


def crash(_: object) -> None:
    raise RuntimeError("crash of the test")


def stopped_at(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, batch: int, *overrides: str) -> Path:
    """A run that crashed after ``batch`` batches; its checkpoints are every second one. The folder of its checkpoints."""
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", batch, crash))
        with pytest.raises(RuntimeError, match="crash of the test"):
            train(config_of(folder, data, *overrides))
    return folder / "runs" / "a" / "checkpoints"


def weight_bytes(path: Path) -> tuple[int, int]:
    """Offset and size of the largest entry of a checkpoint file: a weight."""
    with zipfile.ZipFile(path) as archive:
        entries = [info for info in archive.infolist() if "/data/" in info.filename]
        entry = max(entries, key=lambda info: info.file_size)
    with path.open("rb") as file:  # the local header has two names of its own lengths
        file.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return entry.header_offset + 30 + name + extra, entry.file_size


def flip(path: Path, kind: str) -> None:
    start, size = weight_bytes(path)
    content = bytearray(path.read_bytes())
    if kind == "a byte":
        content[start + size // 2] ^= 0x40
    elif kind == "1 in 16 weights":
        for place in range(start + 3, start + size, 64):
            content[place] ^= 0x80
    else:  # a hole
        content[start : start + min(size, 128 << 10)] = bytes(min(size, 128 << 10))
    path.write_bytes(content)


@pytest.mark.fault("checkpoint corrupt", happened="skipped by name, resumes from the one before")
@pytest.mark.parametrize("kind", ["a byte", "1 in 16 weights", "zeros"])
def test_a_corrupt_checkpoint_is_skipped(
    kind: str,
    tmp_path: Path,
    data: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = stopped_at(tmp_path, data, monkeypatch, 5)
    broken = folder / "ep0-ba4-rank0.pt"
    flip(broken, kind)
    for read in (
        lambda: load_native(broken),
        lambda: export(broken, tmp_path / "exported"),
        checkpoint.open(broken).verify,
    ):
        with pytest.raises(UserError, match=r"ep0-ba4-rank0.pt is corrupt.*use an earlier checkpoint"):
            read()
    recovers(tmp_path, data, whole)
    assert "skipped a broken checkpoint" in capsys.readouterr().out
    assert record_of(tmp_path)["sessions"][-1]["skipped"]


@pytest.mark.fault("load_path corrupt", happened="refused, names the entry")
def test_a_corrupt_load_path_is_refused(tmp_path: Path, data: Path, whole: Path) -> None:
    broken = tmp_path / "ep0-ba8-rank0.pt"
    shutil.copytree(whole / "tokenizer", tmp_path / "tokenizer")
    shutil.copy(next((whole / "checkpoints").glob("ep*-ba8-rank0.pt")), broken)
    flip(broken, "a byte")
    fails(make_config(tmp_path, data, f"load_path={broken}", "load_weights_only=true"), "is corrupt: archive/data/")
    fault_table.record(lost=None)


@pytest.mark.fault("a save that reads back broken", happened="stopped; the checkpoint before it is kept")
def test_a_checkpoint_is_read_back_before_the_old_one_goes(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mohd_train.checkpoint import save

    write = save.write_checkpoint

    def bad_disk(state_dict: dict[str, Any], filename: str) -> None:
        write(state_dict, filename)
        if "ba6" in filename:
            flip(Path(filename), "a byte")

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_checkpoint", bad_disk)
        fails(config_of(tmp_path, data, "save_num_checkpoints_to_keep=1"), "ep0-ba6-rank0.pt is corrupt")
    assert batches_of(tmp_path) == [4, 6]
    recovers(tmp_path, data, whole, "save_num_checkpoints_to_keep=1")


@pytest.mark.fault("autoresume, checkpoints not there", happened="refused; metrics.jsonl untouched")
@pytest.mark.parametrize("how", ["not mounted", "mistyped"])
def test_missing_checkpoints_are_not_a_new_run(
    how: str, tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_at(tmp_path, data, monkeypatch, 5)
    metrics = (tmp_path / "runs" / "a" / "metrics.jsonl").read_bytes()
    overrides = [] if how == "not mounted" else [f"save_folder={tmp_path}/chekpoints"]
    away = folder.rename(tmp_path / "away") if how == "not mounted" else None
    fails(
        config_of(tmp_path, data, *overrides),
        r"run.json says that batch 4 was saved, but there is no checkpoint in .*save_overwrite=true",
    )
    with pytest.raises(UserError, match="there is no checkpoint"):
        dry_run(config_of(tmp_path, data, *overrides))
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").read_bytes() == metrics
    if away is not None:
        folder.exists() and folder.rmdir()
        away.rename(folder)
    recovers(tmp_path, data, whole)


@pytest.mark.fault("two runs with one save_folder", happened="the second one refused, live or later")
def test_one_save_folder_one_run(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = f"save_folder={tmp_path}/shared"
    refusals = []

    def second(_: object) -> None:
        with pytest.raises(UserError, match="in use by a live run") as caught:
            train(config_of(tmp_path, data, shared, "run_name=b", "optimizer.lr=0.001"))
        refusals.append(caught.value)

    with monkeypatch.context() as patch:
        inject(patch, At("batch_end", 3, second), At("after_backward", 5, crash))
        with pytest.raises(RuntimeError, match="crash of the test"):
            train(config_of(tmp_path, data, shared))
    assert len(refusals) == 1
    fails(config_of(tmp_path, data, shared, "run_name=b", "optimizer.lr=0.001"), "belongs to the run a|of another run")
    train(config_of(tmp_path, data, shared))
    last = next((tmp_path / "shared").glob("ep*-ba8-rank0.pt"))
    for name, value in checkpoint.open(next((whole / "checkpoints").glob("ep*-ba8-rank0.pt"))).tensors().items():
        assert torch.equal(checkpoint.open(last).tensors()[name], value), name
    fault_table.record(lost=1)


def test_a_checkpoint_of_another_run_is_not_resumed_from(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever put it there: the checkpoint itself says which run wrote it."""
    stopped_at(tmp_path, data, monkeypatch, 5)
    stopped_at(tmp_path / "other", data, monkeypatch, 7, "optimizer.lr=0.001")
    for path in (tmp_path / "other/runs/a/checkpoints").glob("ep0-ba6*"):
        shutil.copy(path, tmp_path / "runs/a/checkpoints")
    fails(config_of(tmp_path, data), r"was written by another run \(optimizer.lr: 0.001 there")


def test_each_run_has_its_own_tokenizer(tmp_path: Path, data: Path) -> None:
    """Checkpoint folders side by side: the second run's tokenizer must not become the first one's."""
    short = ("max_duration=2ba", "eval_interval=4ba")
    for name in ("a", "b"):
        train(config_of(tmp_path, data, f"run_name={name}", f"save_folder={tmp_path}/CK/{name}", *short))
    found = [checkpoint.open(tmp_path / "CK" / name / "latest-rank0.pt").tokenizer_folder for name in ("a", "b")]
    assert found == [tmp_path.resolve() / "CK" / name / "tokenizer" for name in ("a", "b")]
    assert all(any(folder.iterdir()) for folder in found)
    assert not (tmp_path / "CK" / "tokenizer").exists()


@pytest.mark.fault("weights not finite at a save", happened="not saved; the last good checkpoint is named")
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_nonfinite_weights_are_not_saved(
    where: str, tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(state: Any) -> None:
        parameter = state.model.model.embedding.weight
        target = parameter.data if where == "weight" else state.optimizers[0].state[parameter]["exp_avg"]
        target[0, 0] = float("nan")

    with monkeypatch.context() as patch:
        inject(patch, At("batch_end", 6, spoil))
        message = fails(config_of(tmp_path, data), "batch 6 is not saved: .*embedding.weight holds NaN or infinity")
    assert "ep0-ba4-rank0.pt" in message
    assert batches_of(tmp_path) == [2, 4]
    recovers(tmp_path, data, whole)


@pytest.mark.fault("a checkpoint with a NaN row", happened="refused when it is loaded")
def test_a_nonfinite_checkpoint_is_refused(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_at(tmp_path, data, monkeypatch, 5)
    path = folder / "ep0-ba4-rank0.pt"
    content = torch.load(path, weights_only=False)
    content["state"]["model"]["model.embedding.weight"][3] = float("nan")
    torch.save(content, path)
    fails(config_of(tmp_path, data), "unusable: .*embedding.weight holds NaN or infinity; remove it")
    path.unlink()
    recovers(tmp_path, data, whole)


@pytest.mark.fault("load_path past the run's end", happened="refused: nothing would be trained")
def test_a_load_path_past_the_end_is_refused(tmp_path: Path, data: Path, whole: Path) -> None:
    loaded = next((whole / "checkpoints").glob("ep*-ba8-rank0.pt"))
    fails(
        config_of(tmp_path, data, f"load_path={loaded}", "max_duration=4ba"),
        "at batch 8 already.*nothing would be trained",
    )
    fault_table.record(lost=None)


@pytest.mark.fault("stopped early by a callback", happened="status stopped, not finished")
def test_an_early_stop_is_not_a_finish(tmp_path: Path, data: Path) -> None:
    stopper = "callbacks.threshold_stopper={monitor: LanguageCrossEntropy, dataloader_label: cc, threshold: 0.0}"
    train(config_of(tmp_path, data, stopper, "eval_interval=3ba"))
    assert record_of(tmp_path)["status"] == "stopped"
    assert len(read_metrics(tmp_path / "runs/a/metrics.jsonl")) < 8
    fault_table.record(lost=None)


def test_each_session_says_what_trained_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at(tmp_path, data, monkeypatch, 5)
    file = tmp_path / "runs/a/run.json"
    record = json.loads(file.read_text())
    record["sessions"][0]["versions"]["torch"] = "2.6.0"
    record["sessions"][0]["code"]["commit"] = "0123456789abcdef"
    file.write_text(json.dumps(record))
    capsys.readouterr()
    train(config_of(tmp_path, data))
    said = capsys.readouterr().err
    assert "warning: the code changed from 0123456789" in said
    assert f"warning: torch changed from 2.6.0 to {torch.__version__.partition('+')[0]}" in said
    first, second = record_of(tmp_path)["sessions"]
    assert first["versions"]["torch"] == "2.6.0"
    assert second["versions"]["torch"] != "2.6.0"
    assert [entry["kind"] for entry in record_of(tmp_path)["warnings"]] == ["changed", "changed"]
