"""A finished run that the training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.train_support import make_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder in which the run ``a`` has been trained to its end."""
    folder = tmp_path_factory.mktemp("finished")
    from mohd_train.train.train import train

    train(make_config(folder, data, "run_name=a"))
    return folder
