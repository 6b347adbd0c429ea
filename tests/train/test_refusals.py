"""Bad input: one line that names it, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from train.train_support import make_config, make_data, write_config

from mohd_train.config.load import load_config
from mohd_train.errors import UserError
from mohd_train.train.train import dry_run, train


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        train(make_config(*args, **kwargs))
    assert "\n" not in str(caught.value)


def test_bad_data_is_refused_before_anything_is_written(tmp_path: Path, data: Path) -> None:
    refused("no data folder", tmp_path, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("manifest.json", tmp_path, tmp_path / "empty")
    refused("'arxiv'", tmp_path, data, "data.domains={arxiv: 1.0}")
    refused("max_seq_len=8", tmp_path, data, "max_seq_len=8")
    refused("samples of 16 tokens.*max_seq_len=32", tmp_path, data, "max_seq_len=32")
    refused("vocab_size=1000", tmp_path, data, "model.vocab_size=1000")
    refused("reserved name", tmp_path, data, "data.domains={eval: 1.0}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_bad_shard_is_named(damage: str, tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data")
    shard = sorted((folder / "wiki" / "train").glob("shard.*"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-3])
    refused(f"wiki/train/{shard.name}", tmp_path, folder)
    assert not (tmp_path / "runs").exists()


def test_checkpoint_of_another_architecture_is_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    source = finished / "runs" / "a" / "checkpoints" / "latest-rank0.pt"
    refused("another architecture .*hidden_size: 16 here, 32 there", tmp_path, data, f"load_path={source}", mohd="50")
    refused("attention: None here", tmp_path, data, f"load_path={source}", "mohd.expansion=2", mohd="dense")
    refused("no such checkpoint", tmp_path, data, "load_path=nowhere.pt")
    refused("is a folder", tmp_path, data, f"load_path={source.parent}")


def test_checkpoint_that_holds_other_parameters_is_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    """The plan agrees and the weights do not: nothing may be loaded, let alone nothing at all."""
    source = finished / "runs" / "a" / "checkpoints" / "ep0-ba6-rank0.pt"
    content = torch.load(source, weights_only=False)
    weights = content["state"]["model"]
    content["state"]["model"] = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save(content, tmp_path / "renamed.pt")
    refused(r"0 of \d+ match", tmp_path, data, f"load_path={tmp_path / 'renamed.pt'}")
    content["state"]["model"] = weights | {"model.norm.weight": torch.zeros(5)}
    torch.save(content, tmp_path / "shape.pt")
    refused(r"norm.weight is \[5\] there, \[32\] here", tmp_path, data, f"load_path={tmp_path / 'shape.pt'}")
    content["state"]["model"] = weights
    content["state"]["callbacks"]["RunMetadata"]["tokenizer_sha256"] = "cd" * 32
    torch.save(content, tmp_path / "tokenizer.pt")
    refused("another tokenizer", tmp_path, data, f"load_path={tmp_path / 'tokenizer.pt'}")


def test_checkpoint_with_code_is_refused(tmp_path: Path, data: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "was-run"),))

    torch.save({"state": {"model": {}, "callbacks": {"RunMetadata": Payload()}}}, tmp_path / "evil.pt")
    refused("is refused", tmp_path, data, f"load_path={tmp_path / 'evil.pt'}")
    assert not (tmp_path / "was-run").exists()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").touch()
    refused("can't write to .*file/x .*file: not a folder", tmp_path, data, f"run_folder={tmp_path}/file/x")
    refused("can't write to /proc", tmp_path, data, "run_folder=/proc/no-such-folder")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        refused("closed: no permission", tmp_path, data, f"run_folder={tmp_path}/closed/x")


def test_unknown_parts_are_refused_before_the_data_is_read(tmp_path: Path) -> None:
    refused("did you mean 'wandb'", tmp_path, tmp_path / "none", "loggers.wand={}")
    refused("did you mean 'window_size'", tmp_path, tmp_path / "none", "callbacks.speed_monitor.window=1")
    refused("precision=fp32", tmp_path, tmp_path / "none", "precision=amp_bf16")
    refused("share of the run", tmp_path, tmp_path / "none", "scheduler.t_warmup=5tok")


def test_a_warmup_longer_than_an_epoch_is_refused_once_the_data_says_how_long_that_is(
    tmp_path: Path, data: Path
) -> None:
    with pytest.raises(UserError, match=r"scheduler.t_warmup is '100ba', 100 batches, and the run has \d+ .*'1ep'"):
        dry_run(make_config(tmp_path, data, "max_duration=1ep", "scheduler.t_warmup=100ba"))
    with pytest.raises(UserError, match=r"scheduler.t_warmup is '9ep', \d+ batches, and the run has 6 "):
        dry_run(make_config(tmp_path, data, "scheduler.t_warmup=9ep"))
    dry_run(make_config(tmp_path, data, "max_duration=1ep", "scheduler.t_warmup=1ep"))


def test_config_file_alone_lacks_nothing(tmp_path: Path, data: Path) -> None:
    assert load_config([str(write_config(tmp_path, data))]).mohd.name == "dense"
