"""Shared fixtures. Tests make their own small data; those on real data run where it is there."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@pytest.fixture(autouse=True)
def _shared_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """streaming frees a data set's shared memory when the process ends. Hundreds of runs in one process would have
    thousands of open files, and each new data set looks at the memory of all before it."""
    from streaming.base.shared.memory import SharedMemory

    made: list[SharedMemory] = []
    theirs = SharedMemory.__init__

    def init(self: SharedMemory, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(SharedMemory, "__init__", init)
    owner = os.getpid()
    yield
    for memory in made if os.getpid() == owner else ():
        atexit.unregister(memory.cleanup)
        try:
            memory.cleanup()
        except BufferError:  # an array still looks at it: the name and the file go all the same
            for block in [*memory.created_shms, *memory.opened_shms]:
                if block in memory.created_shms:
                    with contextlib.suppress(FileNotFoundError):
                        block.unlink()
                if block._fd >= 0:
                    os.close(block._fd)
                    block._fd = -1


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
