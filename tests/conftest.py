"""Shared fixtures. Tests make their own small data; those on real data run where it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from support.s3_server import S3Server

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


@pytest.fixture(scope="session")
def _server() -> Iterator[S3Server]:
    from support.s3_server import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An empty bucket on a server of S3's protocol that this process uses."""
    from support.s3_server import BUCKET, point_to

    from mohd_train import storage

    point_to(_server, monkeypatch)
    monkeypatch.setattr(storage, "WAIT", 0.01)
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    client = _server.client()
    client.create_bucket(Bucket=BUCKET)
    yield _server
    _server.fail = lambda _: None
    _server.refused = 0
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
