"""Checkpoints, metrics and data on object storage: a server of S3's protocol, which fails when it is told to."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composer.core import State
from faults.conftest import FULL
from faults.faults_support import (
    At,
    batches_of,
    config_of,
    ends_as,
    fails,
    goes_on,
    in_a_process,
    inject,
    last_batch,
    record_of,
)
from support import fault_table
from support.s3_server import BUCKET, Environ, S3Server, first
from train.train_support import make_config

from mohd_train import checkpoint, storage
from mohd_train.config.schema import Config
from mohd_train.data.prepare import Request, prepare
from mohd_train.errors import UserError, run_cli
from mohd_train.hf.export import export
from mohd_train.train.callbacks import Uploads
from mohd_train.train.train import dry_run, train

RUN = f"s3://{BUCKET}/runs/a/checkpoints"
PREFIX = "runs/a/checkpoints/"


@pytest.fixture
def remote(s3: S3Server, tmp_path: Path, data: Path) -> Callable[..., Config]:
    """Config of the run on a machine (a folder), saved on the server."""

    def config(machine: str, *overrides: str) -> Config:
        return config_of(tmp_path / machine, data, f"save_folder={RUN}", *overrides)

    return config


def stored(s3: S3Server) -> dict[str, bytes]:
    """Every object below the save folder."""
    client = s3.client()
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET, Prefix=PREFIX).get("Contents", [])]
    return {key.removeprefix(PREFIX): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def newest(s3: S3Server) -> str:
    return stored(s3).get("latest-rank0.pt.symlink", b"").decode().rpartition("/")[2]


def put(s3: S3Server, name: str, content: bytes) -> None:
    s3.client().put_object(Bucket=BUCKET, Key=PREFIX + name, Body=content)


def wait_for(s3: S3Server, name: str) -> None:
    for _ in range(200):
        if newest(s3) == name:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} never came")


def killed(config: Config, monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    """Kills the run in batch 6, once the checkpoint of batch 4 has arrived."""

    def kill(_: object) -> None:
        wait_for(s3, "ep0-ba4-rank0.pt")
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 5, kill))
        assert in_a_process(lambda: train(config)) == -signal.SIGKILL


@pytest.mark.fault("kill -9 and the disk gone, save_folder on S3", happened="goes on from the storage alone")
def test_goes_on_from_the_storage_alone(
    tmp_path: Path, whole: Path, s3: S3Server, remote: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(remote("one"), monkeypatch, s3)
    before = last_batch(tmp_path / "one")
    assert {"run.json", "config.yaml", "metrics.jsonl", "tokenizer/tokenizer.json"} < stored(s3).keys()
    shutil.rmtree(tmp_path / "one")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    copies: list[list[Path]] = []
    with monkeypatch.context() as patch:  # the copy of the checkpoint is gone as soon as it is loaded
        inject(patch, At("fit_start", 4, lambda _: copies.append(list(scratch.glob("mohd_train-remote-*")))))
        train(remote("two"))
    assert copies == [[]]
    ends_as(tmp_path / "two", whole)
    fault_table.measured_resume(tmp_path / "two" / "runs" / "a", before)
    assert record_of(tmp_path / "two")["sessions"][-1]["from"] == f"{RUN}/ep0-ba4-rank0.pt"
    there = stored(s3)
    assert newest(s3) == "ep0-ba8-rank0.pt"
    assert json.loads(there["run.json"]) == record_of(tmp_path / "two")
    local = tmp_path / "two" / "runs" / "a"
    assert there["metrics.jsonl"] == (local / "metrics.jsonl").read_bytes()
    assert there["ep0-ba8-rank0.pt"] == (local / "checkpoints" / "ep0-ba8-rank0.pt").read_bytes()
    assert not list((local / "checkpoints").glob(".*"))


@pytest.mark.fault("SIGTERM, save_folder on S3", happened="saved and uploaded before it leaves")
def test_sigterm(
    tmp_path: Path, whole: Path, s3: S3Server, remote: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
        train(remote("one"))
    assert newest(s3) == "ep0-ba5-rank0.pt"
    assert json.loads(stored(s3)["run.json"])["status"] == "preempted"
    train(remote("two"))
    ends_as(tmp_path / "two", whole)
    fault_table.measured_resume(tmp_path / "two" / "runs" / "a", last_batch(tmp_path / "one"))


@pytest.mark.fault("half a checkpoint on the storage", happened="named and skipped; goes on from the one before")
def test_a_half_uploaded_checkpoint(
    tmp_path: Path,
    whole: Path,
    s3: S3Server,
    remote: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed(remote("one"), monkeypatch, s3)
    put(s3, "ep0-ba6-rank0.pt", b"never named by the link")
    content = stored(s3)["ep0-ba4-rank0.pt"]
    put(s3, "ep0-ba4-rank0.pt", content[: len(content) // 2])
    capsys.readouterr()
    train(remote("two"))
    assert f"skipped a broken checkpoint: {RUN}/ep0-ba4-rank0.pt is broken or half-written" in capsys.readouterr().out
    ends_as(tmp_path / "two", whole)
    fault_table.measured_resume(tmp_path / "two" / "runs" / "a", last_batch(tmp_path / "one"))


@pytest.mark.fault("storage answers 503 for a while", happened="tried again and logged; goes on")
def test_a_busy_storage(tmp_path: Path, data: Path, whole: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        wait_for(s3, "ep0-ba2-rank0.pt")
        s3.fail = first(2, method="PUT")

    inject(monkeypatch, At("batch_end", 3, fail))
    s3.fail = first(2, "500 Internal Error")  # at the start too
    goes_on(tmp_path, data, whole, f"save_folder={RUN}")
    assert s3.refused == 4
    log = (tmp_path / "runs" / "a" / "logs" / "rank0.log").read_text()
    assert "uploading s3://bucket/runs/a/checkpoints/ep0-ba4-rank0.pt failed" in log
    assert "attempt 2 of 3" in log
    assert newest(s3) == "ep0-ba8-rank0.pt"


def refusing(name: str) -> Callable[[Environ], str | None]:
    """Never takes objects of this name."""
    return lambda environ: (
        "503 Slow Down" if environ["REQUEST_METHOD"] == "PUT" and name in environ["PATH_INFO"] else None
    )


@pytest.mark.fault("storage takes one checkpoint never", happened="warned; goes on, the next one arrives")
def test_one_checkpoint_is_lost(
    tmp_path: Path, data: Path, whole: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.fail = refusing("ba4-rank0.pt")

    def until_given_up(_: object) -> None:
        for _ in range(200):
            if s3.refused == storage.ATTEMPTS:
                break
            time.sleep(0.1)
        time.sleep(0.2)

    inject(monkeypatch, At("batch_start", 4, until_given_up))
    goes_on(tmp_path, data, whole, f"save_folder={RUN}")
    assert newest(s3) == "ep0-ba8-rank0.pt"
    assert "ep0-ba4-rank0.pt" not in stored(s3)
    assert {entry["kind"] for entry in record_of(tmp_path)["warnings"]} == {"upload"}


@pytest.mark.fault(
    "storage gone at the end of a run", happened="exit 1, all on the local disk; uploaded by the next start"
)
def test_the_end_is_uploaded_later(tmp_path: Path, data: Path, whole: Path, s3: S3Server) -> None:
    s3.fail = refusing("ba8-rank0.pt")
    config = config_of(tmp_path, data, f"save_folder={RUN}")
    assert "the run's files are complete in" in fails(config, "uploading .*ep0-ba8-rank0.pt failed .*SlowDown")
    ends_as(tmp_path, whole)
    assert newest(s3) == "ep0-ba6-rank0.pt"
    s3.fail = lambda _: None
    train(config)
    assert newest(s3) == "ep0-ba8-rank0.pt"
    assert json.loads(stored(s3)["run.json"])["status"] == "finished"
    fault_table.measured_whole(tmp_path / "runs" / "a", 8)


WRONG = [
    ("no such bucket", "save_folder=s3://none/runs/{run_name}", "NoSuchBucket"),
    ("wrong credentials", f"save_folder={RUN}", "InvalidAccessKeyId"),
    ("no server", f"save_folder={RUN}", "listing .* failed"),
    ("no permission to write", f"save_folder={RUN}", "uploading .* failed .*AccessDenied"),
    ("unknown storage", "save_folder=ftp://host/runs/a", "no storage of this kind"),
]


@pytest.mark.fault("storage wrong from the start", happened="one line before any training; the folder stays free")
@pytest.mark.parametrize(("kind", "option", "message"), WRONG, ids=[kind for kind, *_ in WRONG])
def test_refused_before_training(
    kind: str, option: str, message: str, tmp_path: Path, data: Path, whole: Path, s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kind == "wrong credentials":
        s3.fail = lambda _: "403 InvalidAccessKeyId"
    elif kind == "no permission to write":
        s3.fail = lambda environ: "403 AccessDenied" if environ["REQUEST_METHOD"] == "PUT" else None
    elif kind == "no server":
        monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    fails(config_of(tmp_path, data, option), message)
    assert last_batch(tmp_path) == 0
    s3.fail = lambda _: None
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.url)
    config = config_of(tmp_path, data, f"save_folder={RUN}")
    if kind == "no permission to write":
        train(config)
        ends_as(tmp_path, whole)
    else:
        assert not (tmp_path / "runs").exists()
        dry_run(config)
    fault_table.record(lost=0, stopped=0, resumed=0)


@pytest.mark.fault("another run in the save_folder on S3", happened="refused; what is there stays")
def test_another_run_is_refused(tmp_path: Path, data: Path, s3: S3Server, remote: Callable[..., Config]) -> None:
    train(remote("one", "max_duration=4ba"))
    before = stored(s3)
    fails(remote("two", "max_duration=4ba", "optimizer.lr=0.5"), r"s3://bucket/runs/a/checkpoints holds another run")
    fails(remote("two", "max_duration=4ba", "autoresume=false"), "already holds this run .finished, at batch 4")
    assert stored(s3) == before
    train(remote("three", "max_duration=2ba", "autoresume=false", "save_overwrite=true"))
    assert newest(s3) == "ep0-ba2-rank0.pt"
    fault_table.record(lost=None)


def uploaded(state: State) -> None:
    """Waits until no upload is on its way."""
    uploads = next(callback for callback in state.callbacks if isinstance(callback, Uploads))
    for _ in range(600):
        if all(future.done() for _, future in uploads._futures):
            return
        time.sleep(0.1)
    raise AssertionError("an upload never ended")


@pytest.mark.fault("two machines train one run on S3", happened="the one that started last has it; the other one stops")
def test_two_machines(
    tmp_path: Path, whole: Path, s3: S3Server, remote: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, given up in batch 4, comes back once the second has gone on to the end."""
    over = multiprocessing.get_context("fork").Event()
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 3, lambda _: over.wait(60)), At("after_backward", 5, uploaded))
        one = multiprocessing.get_context("fork").Process(target=lambda: run_cli(lambda: train(remote("one"))))
        one.start()
    wait_for(s3, "ep0-ba2-rank0.pt")
    train(remote("two"))
    there = stored(s3)
    over.set()
    one.join(60)
    assert one.exitcode == 1
    left = record_of(tmp_path / "one")
    assert "checkpoints now belongs to another session of this run, started 20" in left["error"]
    assert "what it has trained since its last upload remains in" in left["error"]
    assert left["status"] == "failed"
    assert 4 <= last_batch(tmp_path / "one") < 8
    ends_as(tmp_path / "two", whole)
    assert stored(s3) == there
    assert json.loads(there["run.json"]) == record_of(tmp_path / "two")
    fault_table.record(lost=0, stopped=last_batch(tmp_path / "one"))


def test_the_further_one_of_disk_and_storage(
    tmp_path: Path, whole: Path, s3: S3Server, remote: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(remote("one"), monkeypatch, s3)
    assert batches_of(tmp_path / "one") == [2, 4]
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    s3.fail = refusing("ba6-rank0.pt")
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 7, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
        assert in_a_process(lambda: train(remote("one"))) == -signal.SIGKILL
    s3.fail = lambda _: None
    assert newest(s3) == "ep0-ba4-rank0.pt"
    train(remote("one"))  # the disk's is newer
    assert record_of(tmp_path / "one")["sessions"][-1]["from"].endswith("one/runs/a/checkpoints/ep0-ba6-rank0.pt")
    ends_as(tmp_path / "one", whole)
    train(remote("three"))  # the storage's is newer, and says that the run is finished
    assert record_of(tmp_path / "three")["batch"] == 4


def upload_data(s3: S3Server, data: Path) -> None:
    client = s3.client()
    for path in data.rglob("*"):
        if path.is_file() and path.suffix not in (".mds", ".lock"):
            client.upload_file(str(path), BUCKET, f"data/{path.relative_to(data)}")


@pytest.mark.fault(
    "data on S3, busy at the start and at a shard", happened="tried again and logged; losses as on a disk"
)
@pytest.mark.parametrize("workers", [0, 1])
def test_data_on_storage(workers: int, tmp_path: Path, data: Path, whole: Path, s3: S3Server) -> None:
    upload_data(s3, data)
    left = {"manifest.json": 1, "shard.00000.mds.zstd": 1}

    def fail(environ: Environ) -> str | None:
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] in ("GET", "HEAD") and left.get(name):
            left[name] -= 1
            return "503 Slow Down"
        return None

    s3.fail = fail
    options = (f"data.remote=s3://{BUCKET}/data", f"data.local={tmp_path}/cache", f"data.num_workers={workers}")
    goes_on(tmp_path, data, whole, *options)
    assert left == {"manifest.json": 0, "shard.00000.mds.zstd": 0}
    assert "shard.00000.mds.zstd" in (tmp_path / "runs" / "a" / "logs" / "rank0.log").read_text()


@pytest.mark.fault("a shard is missing on S3", happened="ends, names the shard; goes on once it is there")
def test_a_shard_is_missing_on_storage(tmp_path: Path, data: Path, whole: Path, s3: S3Server) -> None:
    upload_data(s3, data)
    key = "data/wiki/train/shard.00000.mds.zstd"
    s3.client().delete_object(Bucket=BUCKET, Key=key)
    options = (f"data.remote=s3://{BUCKET}/data", f"data.local={tmp_path}/cache", "data.download_retry=1")
    fails(config_of(tmp_path, data, *options), r"wiki/train/shard.00000.mds: can't be fetched")
    s3.client().upload_file(str(data / "wiki/train/shard.00000.mds.zstd"), BUCKET, key)
    before = last_batch(tmp_path)
    train(config_of(tmp_path, data, *options))
    ends_as(tmp_path, whole)
    fault_table.measured_resume(tmp_path / "runs" / "a", before)


def test_names_that_lead_away_are_refused(s3: S3Server, tmp_path: Path) -> None:
    put(s3, "ep0-ba2/../../../../away", b"x")
    with pytest.raises(UserError, match=r"is refused: it holds an object named 'ep0-ba2/\.\./"):
        storage.download_checkpoint(f"{RUN}/ep0-ba2", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("away"))


def test_a_checkpoint_on_storage_is_read(tmp_path: Path, data: Path, remote: Callable[..., Config]) -> None:
    """By load_path, evaluation and export."""
    train(remote("one", "max_duration=2ba"))
    load = f"load_path={RUN}/ep0-ba2-rank0.pt"
    dry_run(make_config(tmp_path, data, "run_name=b", *FULL, load, "max_duration=1ba", "scheduler.t_warmup=0ba"))
    with pytest.raises(UserError, match="no such checkpoint"):
        dry_run(make_config(tmp_path, data, "run_name=b", *FULL, load.replace("ba2", "ba9")))
    assert not (tmp_path / "runs").exists()
    local = tmp_path / "one" / "runs" / "a" / "checkpoints" / "ep0-ba2-rank0.pt"
    found = checkpoint.open(f"{RUN}/latest-rank0.pt")
    assert (found.source, found.fingerprint) == (f"{RUN}/latest-rank0.pt", checkpoint.open(local).fingerprint)
    assert found.run_folder.name == "a"
    assert (found.run_folder / "tokenizer" / "tokenizer.json").is_file()
    ours, theirs = (checkpoint.open(path).tensors() for path in (local, found.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match=r"no such checkpoint; s3://bucket/runs/a/checkpoints has ep0-ba2-rank0.pt"):
        checkpoint.open(f"{RUN}/ep0-ba7-rank0.pt")
    with pytest.raises(UserError, match="holds no readable tokenizer"):  # the tests' tokenizer is none
        export(f"{RUN}/latest-rank0.pt", tmp_path / "exported")


def test_what_must_be_local_says_so(tmp_path: Path, data: Path) -> None:
    away = f"s3://{BUCKET}/a"
    fails(make_config(tmp_path, data, "run_name=a", f"run_folder={away}"), "run_folder is s3://.* set save_folder")
    fails(make_config(tmp_path, data, "run_name=a", f"data.local={away}"), "data.local is s3://.* set data.remote")
    with pytest.raises(UserError, match=r"--out is s3://.*aws s3 sync"):
        prepare(Request(str(tmp_path), away, "none"))
    assert not list(tmp_path.glob("s3*"))
