"""What a run prints and logs may fail without ending it."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from composer.loggers import TensorboardLogger
from faults.faults_support import At, batches_of, config_of, fails, goes_on, in_a_process, inject, recovers
from support.fault_table import measured_resume

from mohd_train.run_folder import metrics as metrics_module
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train.train import train
from mohd_train.utils.terminal import Unbreakable, unbreakable_output


class Gone(io.StringIO):
    """A terminal that went away."""

    encoding = "ascii"

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.fault(
    "the terminal goes away, or the log's disk is full", happened="trains on; metrics.jsonl has everything"
)
@pytest.mark.parametrize("interval", ["1ba", "null"])
def test_the_terminal_goes_away(
    interval: str, tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    goes_on(tmp_path, data, whole, f"console_log_interval={interval}")


@pytest.mark.fault("stdout is ASCII", happened="trains on; what it can't say is replaced")
def test_ascii_output(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(taken, encoding="ascii", write_through=True))
    goes_on(tmp_path, data, whole)
    assert b"finished: " in taken.getvalue()
    assert b"length     8 batches ? " in taken.getvalue()


def test_a_lost_stream_does_not_change_the_exit_code() -> None:
    def work() -> None:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        with unbreakable_output():
            print("x" * 100_000, flush=True)
        sys.stdout.flush()

    assert in_a_process(work) == 0


def test_unbreakable_leaves_the_rest_to_the_stream() -> None:
    inner = io.StringIO()
    outer = Unbreakable(inner)
    assert outer.write("a") == 1
    outer.flush()
    assert (inner.getvalue(), outer.is_lost, outer.isatty()) == ("a", False, False)


@pytest.mark.fault("metrics.jsonl can't be written", happened="saves that batch, then stops with one line")
def test_metrics_that_fail_save_first(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = metrics_module._write_all

    def full(file: Any, content: bytes) -> None:
        write(file, content[:10])  # a part arrives
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(_: object) -> None:
        patch.setattr(metrics_module, "_write_all", full)

    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, fill))
        message = fails(config_of(tmp_path, data), "metrics.jsonl can't be written .No space left on device.")
    assert "this batch is saved" in message
    assert batches_of(tmp_path) == [2, 4, 5]
    assert [record["batch"] for record in read_metrics(tmp_path / "runs/a/metrics.jsonl")] == [1, 2, 3, 4]
    train(config_of(tmp_path, data))
    assert batches_of(tmp_path)[-1] == 8
    measured_resume(tmp_path / "runs" / "a", 5)


@pytest.mark.fault("power loss in metrics.jsonl (NULs)", happened="read without them; resumes")
def test_nuls_of_a_power_loss(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_power(_: object) -> None:
        raise RuntimeError("no power")

    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, lose_power))
        with pytest.raises(RuntimeError, match="no power"):
            train(config_of(tmp_path, data))
    with (tmp_path / "runs/a/metrics.jsonl").open("ab") as file:
        file.write(bytes(4096) + b"\n")
    recovers(tmp_path, data, whole)


@pytest.mark.fault("TensorBoard fails while running", happened="switched off with a message; trains on")
def test_a_logger_that_fails_is_switched_off(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorboardLogger, "batch_end", fail, raising=False)
    goes_on(tmp_path, data, whole, "loggers.tensorboard={}")
    assert len(calls) == 1
    assert "tensorboard failed (OSError" in caplog.text


def test_a_logger_that_can_not_start_is_reported(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("a wrong setting")

    monkeypatch.setattr(TensorboardLogger, "init", refuse)
    with pytest.raises(ValueError, match="a wrong setting"):
        train(config_of(tmp_path, data, "loggers.tensorboard={}"))
