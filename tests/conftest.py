"""Shared fixtures. Tests make their own small data; those on real data run where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
def _seeded() -> None:
    torch.manual_seed(0)
