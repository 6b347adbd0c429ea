"""A start that hangs, W&B out of reach, secrets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from faults.faults_support import At, config_of, goes_on, in_a_process, inject, recovers
from support import fault_table

from mohd_train.config.schema import Config
from mohd_train.run_folder.paths import LATEST
from mohd_train.run_folder.secrets import HIDDEN, without_secrets
from mohd_train.train import train as run_module
from mohd_train.train.callbacks import watchdog
from mohd_train.train.train import train


@pytest.fixture(autouse=True)
def _wandb_ends() -> Iterator[None]:
    yield
    wandb.finish()


def a_hanging_download(*_: Any) -> None:
    time.sleep(100)


@pytest.mark.fault("start-up hangs", happened="ended after start_timeout, each rank's stack written")
def test_a_hanging_start_is_reported(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_data", a_hanging_download)
        patch.setattr(watchdog, "REPORT_TIME", 0.1)
        config = config_of(tmp_path, data, "start_timeout=1.5")
        assert in_a_process(lambda: train(config)) == 1
    text = (tmp_path / "runs" / "a" / "logs" / "rank0.stacks.txt").read_text()
    assert "in a_hanging_download" in text
    recovers(tmp_path, data, whole)


@pytest.mark.fault("W&B can't be reached", happened="said, recorded offline, goes on")
def test_wandb_out_of_reach(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, modes = wandb.init, []

    def init(**arguments: Any) -> Any:
        modes.append(arguments.get("mode"))
        if arguments.get("mode") != "offline":
            raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec")
        return theirs(**arguments)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "init", init)
    goes_on(tmp_path, data, whole, "loggers.wandb={project: p}")
    assert modes == [None, "offline"]
    assert list((tmp_path / "runs" / "a" / "wandb").glob("offline-run-*"))
    assert "W&B can't be reached (Run initialization has timed out" in capsys.readouterr().err


@pytest.mark.fault("W&B fails while running", happened="switched off aloud, goes on; metrics.jsonl has everything")
def test_wandb_fails_while_running(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("the service went away")

    monkeypatch.setenv("WANDB_MODE", "offline")
    inject(monkeypatch, At("batch_end", 3, lambda _: monkeypatch.setattr(wandb, "log", gone)))
    goes_on(tmp_path, data, whole, "loggers.wandb={project: p}")


def test_secrets_are_hidden() -> None:
    given = {"wandb": {"init_kwargs": {"api_key": "abc", "project": "p"}}, "list": [{"aws_secret_access_key": "x"}]}
    shown = without_secrets(given | {"remote": "https://me:pass@host/x", "password": "q", "max_tokens": 5})
    assert shown["wandb"]["init_kwargs"] == {"api_key": HIDDEN, "project": "p"}
    assert shown["list"] == [{"aws_secret_access_key": HIDDEN}]
    assert (shown["remote"], shown["password"], shown["max_tokens"]) == (f"https://{HIDDEN}@host/x", HIDDEN, 5)
    assert without_secrets(Config(run_name="a")) == Config(run_name="a")


@pytest.mark.fault("a secret in config and environment", happened="in no file of the run, nor its checkpoints")
def test_no_secret_is_written(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "s3cr3t-value-of-the-test"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = f"loggers.wandb={{project: p, init_kwargs: {{config: {{api_key: {secret}}}}}}}"
    options = (logger, "loggers.tensorboard={}", "python_log_level=debug", "max_duration=2ba", "run_name=b")
    train(config_of(tmp_path, data, *options))
    printed = "".join(capsys.readouterr())
    folder = tmp_path / "runs" / "b"
    assert (folder / "checkpoints" / LATEST).exists()
    assert json.loads((folder / "run.json").read_text())["config"]["loggers"]["wandb"]["init_kwargs"]["config"] == {
        "api_key": HIDDEN
    }
    files = [
        path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts
    ]  # its own record is W&B's
    assert len(files) > 5
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in printed
    fault_table.measured_whole(folder, 2)
