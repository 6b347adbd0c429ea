"""Data and a finished run that the training tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from train.train_support import make_config, make_data


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder in which the run ``a`` has been trained to its end."""
    folder = tmp_path_factory.mktemp("finished")
    from mohd_train.train.run import train

    train(make_config(folder, data, "run_name=a"))
    return folder
