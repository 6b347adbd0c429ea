"""Shared fixtures. Tests make their own small data; those on real data run where it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["support.fault_table"]
ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # two workers on two cores; and sums in one order


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real RedPajama rows, LLaMA's tokenizer and task examples: MOHD_REAL_DATA, or ../shared/data."""
    folder = Path(os.environ.get("MOHD_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MOHD_REAL_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)  # a run in this process sets it


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small prepared data that runs train on; not to be changed."""
    from train.train_support import make_data

    return make_data(tmp_path_factory.mktemp("prepared") / "data")
