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
from train.test_run import assert_same_run
from train.train_support import make_config

from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.train import build
from mohd_train.train.run import train

LAST = "ep0-ba8-rank0.pt"


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


def recovers(folder: Path, data: Path, whole: Path, *overrides: str) -> None:
    """Starts the run again, without the fault: it must end as the uninterrupted one, bit for bit."""
    train(config_of(folder, data, *overrides))
    assert record_of(folder)["status"] == "finished"
    assert_same_run(whole, folder / "runs" / "a", LAST)


def in_a_process(work: Callable[[], None], timeout: float = 60, **environment: str) -> int | None:
    """Exit code of ``work`` in a forked process: what it does to itself, it does to itself alone."""

    def run() -> None:
        os.environ |= environment
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout)
    return process.exitcode
