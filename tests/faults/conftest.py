"""Uninterrupted runs, which every recovered one must equal, and a server of S3's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.s3_server import BUCKET, S3Server, point_to
from train.train_support import make_config

FULL = ("save_interval=2ba", "eval_interval=3ba", "max_duration=8ba")
LONG = ("save_interval=2ba", "eval_interval=40ba", "max_duration=40ba")  # more than data workers fetch ahead


def _whole(folder: Path, data: Path, options: tuple[str, ...]) -> Path:
    from mohd_train.train.run import train

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


@pytest.fixture(scope="session")
def _server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An empty bucket on a server that this process uses."""
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
