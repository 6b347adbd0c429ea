"""Uninterrupted runs, which every recovered one must equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.train_support import make_config

FULL = ("save_interval=2ba", "eval_interval=3ba", "max_duration=8ba")
LONG = ("save_interval=2ba", "eval_interval=40ba", "max_duration=40ba")  # more than data workers fetch ahead


def _whole(folder: Path, data: Path, options: tuple[str, ...]) -> Path:
    from mohd_train.train.train import train

    train(make_config(folder, data, "run_name=a", "autoresume=true", *options))
    return folder / "runs" / "a"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run folder of an uninterrupted run of eight batches."""
    return _whole(tmp_path_factory.mktemp("whole"), data, FULL)


@pytest.fixture(scope="session")
def long_whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run folder of an uninterrupted run of forty batches."""
    return _whole(tmp_path_factory.mktemp("long"), data, LONG)
