"""Faults at a save: a full disk, a kill in the middle, a folder that is gone; and which checkpoints stay."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.faults_support import At, batches_of, config_of, fails, goes_on, in_a_process, inject, record_of, recovers

from mohd_train.checkpoint import save as saver
from mohd_train.train.train import train


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files of this process can't grow beyond ``limit`` bytes: the kernel itself cuts the write short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(content: Any, file: Any) -> None:
    """torch.save onto a disk with room for 1000 bytes."""

    class Full:
        room = 1000

        def write(self, data: bytes) -> int:
            if len(data) > self.room:
                file.write(bytes(data)[: self.room])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(data)
            return int(file.write(data))

        def flush(self) -> None:
            file.flush()

    torch_save(content, Full())


torch_save = torch.save


@pytest.mark.fault("disk full at a save", happened="stopped, no half file, names the last checkpoint")
@pytest.mark.parametrize("kind", ["no space", "file too large"])
def test_disk_full(kind: str, tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]

    def save(content: Any, file: Any) -> None:
        count[0] += 1
        if count[0] < 3:
            torch_save(content, file)
        elif kind == "no space":
            full_disk(content, file)
        else:
            with small_files(1000):
                torch_save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(saver.torch, "save", save)
        text = fails(config_of(tmp_path, data), "ep0-ba6-rank0.pt can't be saved .(No space|File too large)")
    assert "GB free" in text
    assert batches_of(tmp_path) == [2, 4]
    assert not saver.leftovers(tmp_path / "runs" / "a" / "checkpoints")
    assert record_of(tmp_path)["checkpoint"].endswith("ep0-ba4-rank0.pt")
    recovers(tmp_path, data, whole)


@pytest.mark.fault("a save that fails once", happened="tried again, goes on")
def test_a_save_is_tried_again(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]

    def save(content: Any, file: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            file.write(b"half")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        torch_save(content, file)

    monkeypatch.setattr(saver.torch, "save", save)
    monkeypatch.setattr(saver, "WAIT", 0.01)
    goes_on(tmp_path, data, whole)
    assert count[0] == 5
    assert batches_of(tmp_path) == [2, 4, 6, 8]


@pytest.mark.fault("kill -9 in the middle of a save", happened="half file cleared, goes on from the one before")
def test_killed_in_a_save(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(content: Any, file: Any) -> None:
        torch_save(content, file)
        if content["state"]["timestamp"]["Timestamp"]["batch"] == 6:
            file.flush()
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(saver.torch, "save", save)
        code = in_a_process(lambda: train(config_of(tmp_path, data)))
    assert code == -signal.SIGKILL
    assert record_of(tmp_path)["status"] == "running"
    assert batches_of(tmp_path) == [2, 4]
    assert len(saver.leftovers(tmp_path / "runs" / "a" / "checkpoints")) == 1
    recovers(tmp_path, data, whole)
    assert not saver.leftovers(tmp_path / "runs" / "a" / "checkpoints")


@pytest.mark.fault("checkpoint folder removed while running", happened="made anew, goes on")
def test_save_folder_gone(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, At("batch_end", 5, lambda _: shutil.rmtree(tmp_path / "runs" / "a" / "checkpoints")))
    goes_on(tmp_path, data, whole)
    assert batches_of(tmp_path) == [6, 8]


@pytest.mark.fault("run folder removed while running", happened="stopped with one line")
def test_run_folder_gone(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 3, lambda _: shutil.rmtree(tmp_path / "runs")))
        fails(config_of(tmp_path, data), "metrics.jsonl: No such file or directory; .* mend the folder")
    recovers(tmp_path, data, whole, done=3)


@pytest.mark.fault("keep the last K and every N, over a kill", happened="exactly those are there")
def test_keep_last_and_every(tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_: object) -> None:
        raise RuntimeError("crash of the test")

    keep = ("save_interval=1ba", "save_num_checkpoints_to_keep=2", "save_keep_every=3ba")
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 5, die))
        with pytest.raises(RuntimeError, match="crash of the test"):
            train(config_of(tmp_path, data, *keep))
    assert batches_of(tmp_path) == [3, 4, 5]
    recovers(tmp_path, data, whole, *keep)
    assert batches_of(tmp_path) == [3, 6, 7, 8]
