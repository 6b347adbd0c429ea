"""Injecting a fault into a run, and comparing what came of it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from faults.conftest import FULL
from support.fault_table import measured_resume, measured_whole
from train.test_run import assert_same_run
from train.train_support import make_config

from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.train import train as build
from mohd_train.train.train import train


class At(Callback):
    """Does something at an event (by its name) once ``batch`` batches are done; once only."""

    def __init__(self, event: str, batch: int, act: Callable[[State], None]) -> None:
        self.event_name, self.batch, self.act, self.done = event, batch, act, False

    def run_event(self, event: Any, state: State, logger: Logger) -> None:
        if event.value == self.event_name and state.timestamp.batch.value == self.batch and not self.done:
            self.done = True
            self.act(state)


def inject(monkeypatch: pytest.MonkeyPatch, *callbacks: Callback) -> None:
    """Adds callbacks to every run; they stand before the project's own."""
    theirs = build.build_callbacks
    monkeypatch.setattr(build, "build_callbacks", lambda *args: [*callbacks, *theirs(*args)])


def config_of(folder: Path, data: Path, *overrides: str) -> Config:
    """The run of the fixture ``whole``, in ``folder``."""
    return make_config(folder, data, "run_name=a", "autoresume=true", *FULL, *overrides)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "a" / "run.json").read_text())


def batches_of(folder: Path) -> list[int]:
    """Of the checkpoints there."""
    return sorted(int(p.name.split("-")[1][2:]) for p in (folder / "runs" / "a" / "checkpoints").glob("ep*.pt"))


def fails(config: Config, match: str) -> str:
    """The one line with which a run ends."""
    with pytest.raises(UserError, match=match) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def last_batch(folder: Path) -> int:
    """The last batch that the run has logged."""
    lines = read_metrics(folder / "runs" / "a" / "metrics.jsonl")
    return lines[-1]["batch"] if lines else 0


def recovers(folder: Path, data: Path, whole: Path, *overrides: str, done: int | None = None) -> None:
    """Starts the run again, without the fault: it must end as the uninterrupted one, bit for bit. What it lost is measured.

    Args:
        done: batches before the fault, where the fault took the log of them too.
    """
    before = last_batch(folder) if done is None else done
    train(config_of(folder, data, *overrides))
    ends_as(folder, whole)
    measured_resume(folder / "runs" / "a", before)


def goes_on(folder: Path, data: Path, whole: Path | None, *overrides: str) -> None:
    """Runs to the end through a fault that must not stop it, and not change it where it is compared with ``whole``."""
    config = config_of(folder, data, *overrides)
    train(config)
    assert record_of(folder)["status"] == "finished"
    if whole is not None:
        ends_as(folder, whole)
    measured_whole(folder / "runs" / "a", int(config.max_duration.removesuffix("ba")))


def ends_as(folder: Path, whole: Path) -> None:
    """The finished run in ``folder`` equals ``whole``: metrics and last weights, bit for bit."""
    assert record_of(folder)["status"] == "finished"
    last = max((whole / "checkpoints").glob("ep*.pt"), key=lambda path: int(path.name.split("-")[1][2:]))
    assert_same_run(whole, folder / "runs" / "a", last.name)


def in_a_process(work: Callable[[], None], timeout: float = 60, **environment: str) -> int | None:
    """Exit code of ``work`` in a forked process: what it does to itself, it does to itself alone."""

    def run() -> None:
        os.environ |= environment
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout)
    return process.exitcode
