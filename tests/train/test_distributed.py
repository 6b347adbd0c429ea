"""FSDP in two processes on a CPU, through Composer: it equals one process, goes on exactly from sharded checkpoints, and these are
read safely, whole or not at all.

Composer runs FSDP on GPUs alone, but for one thing: it asks CUDA for the device. With that answered, what is tested is what
runs on GPUs, wrapping and checkpoints included. Full state dicts stay untested here: torch's FSDP crashes on a CPU where it
offloads them to the CPU.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import dist, get_device
from support.s3_server import BUCKET, S3Server
from torch.distributed import checkpoint as dcp
from train.distributed_support import Place, in_processes, run, run_in, seen
from train.test_run import timeless
from train.train_support import make_config, make_data

from mohd_train import checkpoint
from mohd_train.checkpoint.resume import latest_valid
from mohd_train.checkpoint.sharded import METADATA_FILE
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_native
from mohd_train.train import parallel
from mohd_train.train.folder import check_shared
from mohd_train.train.train import train

BATCHES = 8
FSDP = "fsdp_config={state_dict_type: sharded}"
RECOMPUTED = "fsdp_config={state_dict_type: sharded, activation_checkpointing: true}"
MODELS = ("x2", "dense")


class Runs(Place):
    """Runs of both models: in one process, sharded over two, the same with recomputation, and that through torch.compile."""

    # The router's own learning rate would not be its own if sharding took the groups apart.
    fixed = (f"max_duration={BATCHES}ba", "save_interval=2ba", "eval_interval=4ba", "optimizer.router_lr=1.0e-3")

    def checkpoint(self, name: str, batch: int = BATCHES) -> Path:
        return self.run(name) / "checkpoints" / f"ep0-ba{batch}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("sharded"))
    make_data(made.path / "data")
    for mohd in MODELS:
        run(made.job(f"{mohd}-one", mohd))
    sharded = [made.job(f"{mohd}-sharded", mohd, FSDP, fsdp=True) for mohd in MODELS]
    recomputed = [made.job(f"{mohd}-recomputed", mohd, RECOMPUTED, fsdp=True) for mohd in MODELS]
    compiled = [made.job(f"{mohd}-compiled", mohd, RECOMPUTED, "compile=true", fsdp=True) for mohd in MODELS]
    run_in(2, *sharded, *recomputed, *compiled)
    return made


@pytest.mark.parametrize("kind", ["sharded", "recomputed", "compiled"])
@pytest.mark.parametrize("mohd", MODELS)
def test_fsdp_equals_one_process(runs: Runs, mohd: str, kind: str) -> None:
    one, two = runs.run(f"{mohd}-one"), runs.run(f"{mohd}-{kind}")
    for ours, theirs in zip(timeless(one / "metrics.jsonl"), timeless(two / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-7), (ours["batch"], key)
    rates = {key: value for key, value in timeless(two / "metrics.jsonl")[-1].items() if key.startswith("lr-")}
    assert len(set(rates.values())) == (2 if mohd == "x2" else 1)
    whole = checkpoint.open(one / "checkpoints" / f"ep0-ba{BATCHES}-rank0.pt").tensors()
    parts = checkpoint.open(runs.checkpoint(two.name)).tensors()
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mohd", MODELS)
def test_blocks_are_traced_under_recomputation(runs: Runs, mohd: str) -> None:
    """FSDP's own hooks break the graph between blocks; nothing within one does."""
    found = json.loads((runs.run(f"{mohd}-compiled") / "graphs.json").read_text())
    assert found["graphs"] > 0
    assert all("is_available" in reason for reason in found["breaks"]), found["breaks"]


def test_each_process_writes_its_part(runs: Runs) -> None:
    sizes = [path.stat().st_size for path in sorted(runs.checkpoint("x2-sharded").glob("__*.distcp"))]
    assert len(sizes) == 2
    folder = runs.checkpoint("x2-sharded").parent
    assert (folder / "latest-rank0.pt").resolve() == runs.checkpoint("x2-sharded").resolve()
    assert sorted(path.name for path in folder.iterdir() if not path.is_symlink()) == [
        f"ep0-ba{n}" for n in (2, 4, 6, 8)
    ]


def test_kill_and_resume_equals_uninterrupted(runs: Runs) -> None:
    """Kill -9 of both; on from the checkpoint before the newest, which is made a half; one fewer is kept meanwhile."""
    killed = runs.job("x2-killed", "x2", FSDP, fsdp=True, kill=5)
    assert in_processes(lambda: run(killed)) == [-signal.SIGKILL] * 2
    half = runs.checkpoint("x2-killed", 4)
    (half / METADATA_FILE).unlink()
    (half.parent / ".ep0-ba6.tmp").mkdir()
    found, skipped = latest_valid(half.parent)
    assert found == runs.checkpoint("x2-killed", 2)
    assert f"{half} is broken or half-written" in skipped[0]
    run_in(2, runs.job("x2-killed", "x2", FSDP, "save_num_checkpoints_to_keep=2", fsdp=True, session=2))
    whole, path = runs.run("x2-sharded"), runs.run("x2-killed")
    assert timeless(whole / "metrics.jsonl") == timeless(path / "metrics.jsonl")
    assert seen(whole) == seen(path)
    weights = [checkpoint.open(runs.checkpoint(name)).tensors() for name in ("x2-sharded", "x2-killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    names = sorted(path.name for path in half.parent.iterdir())
    assert names == ["ep0-ba6", "ep0-ba8", "latest-rank0.pt"]


def test_goes_on_from_object_storage(runs: Runs, s3: S3Server) -> None:
    """Every part is stored, the index last; with the disk gone, and the newest one a half, the run goes on and equals."""
    client, where = s3.client(), f"s3://{BUCKET}/runs/stored"
    for session, crash in enumerate((7, None), 1):
        run_in(2, runs.job("x2-stored", "x2", FSDP, f"save_folder={where}", fsdp=True, session=session, crash=crash))
        path = runs.run("x2-stored")
        local = [
            f"ep0-ba{n}/{part}"
            for n in (2, 4, 6, 8)[: 3 if crash else 4]
            for part in (".metadata", "__0_0.distcp", "__1_0.distcp")
        ]
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET, Prefix="runs/stored/ep")["Contents"]]
        assert sorted(key.removeprefix("runs/stored/") for key in keys) == local
        newest = client.get_object(Bucket=BUCKET, Key="runs/stored/latest-rank0.pt.symlink")["Body"].read().decode()
        assert newest == ("runs/stored/ep0-ba6" if crash else "runs/stored/ep0-ba8")
        if crash:
            client.put_object(Bucket=BUCKET, Key=f"{newest}/.metadata", Body=b"")
            shutil.rmtree(path)
    assert json.loads((path / "run.json").read_text())["sessions"][-1]["from"] == f"{where}/ep0-ba4"
    assert timeless(path / "metrics.jsonl") == timeless(runs.run("x2-sharded") / "metrics.jsonl")
    places = (runs.checkpoint("x2-sharded"), f"{where}/latest-rank0.pt")
    whole, stored = (checkpoint.open(place).tensors() for place in places)
    assert all(torch.equal(whole[name], stored[name]) for name in whole)
    assert not list((path / "checkpoints").glob(".*"))


def test_goes_on_in_another_number_of_processes(runs: Runs) -> None:
    """Two, one, two: the parts are cut anew. The samples are the same, and losses differ by the order of sums alone."""
    for session, (count, crash) in enumerate(((2, 3), (1, 5), (2, None)), 1):
        run_in(count, runs.job("x2-moved", "x2", FSDP, fsdp=True, session=session, crash=crash))
    one, moved = runs.run("x2-sharded"), runs.run("x2-moved")
    assert {batch: sorted(rows) for batch, rows in seen(one).items()} == {b: sorted(r) for b, r in seen(moved).items()}
    for ours, theirs in zip(timeless(one / "metrics.jsonl"), timeless(moved / "metrics.jsonl"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)


def test_export_and_evaluation_read_it(runs: Runs) -> None:
    latest = runs.checkpoint("x2-sharded").parent / "latest-rank0.pt"
    model = load_native(latest)
    weights = checkpoint.open(latest).tensors()
    ours = model.transformer.state_dict()
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in ours)
    assert checkpoint.open(latest).is_native
    assert checkpoint.open(latest).kind == "sharded"
    reference = runs.run("x2-one") / "checkpoints" / "latest-rank0.pt"
    assert checkpoint.open(latest).metadata["plan"] == json.loads(
        json.dumps(checkpoint.open(reference).metadata["plan"])
    )


@pytest.mark.parametrize(
    "damage", ["no metadata", "cut metadata", "shard cut", "shard gone", "moments gone", "no shard"]
)
def test_half_of_one_is_refused(runs: Runs, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(runs.checkpoint("x2-sharded"), tmp_path / "ep0-ba8"))
    metadata, shard = folder / METADATA_FILE, folder / "__1_0.distcp"
    if damage == "no metadata":
        metadata.unlink()
    elif damage == "cut metadata":
        metadata.write_bytes(metadata.read_bytes()[:-100])
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "shard gone":
        shard.unlink()
    else:
        content = pickle.loads(metadata.read_bytes())
        if damage == "moments gone":
            gone = next(name for name in content.planner_data if name.endswith("exp_avg"))
            del content.planner_data[gone]
        else:
            next(iter(content.storage_data.values())).relative_path = "../__0_0.distcp"
        metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"is broken or half-written|can't be read"):
        checkpoint.open(folder)
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid"):
        latest_valid(tmp_path)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("place", ["metadata", "within metadata", "shard"])
def test_code_is_refused(runs: Runs, tmp_path: Path, place: str) -> None:
    """In DCP's metadata, which is a pickle, and in a value of a shard, which is another."""
    folder, flag = tmp_path / "ep0-ba8", tmp_path / "ran"
    if place == "shard":
        state = {"state": {"model": {"model.w": torch.zeros(2)}, "callbacks": {"RunMetadata": {"json": Payload(flag)}}}}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    else:
        shutil.copytree(runs.checkpoint("x2-sharded"), folder)
        content: Any = Payload(flag)
        if place == "within metadata":
            content = pickle.loads((folder / METADATA_FILE).read_bytes())
            content.planner_data["x"] = Payload(flag)
        (folder / METADATA_FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"is refused: it holds more than tensors and plain data .*system"):
        checkpoint.open(folder)
    with pytest.raises(UserError, match="is refused"):
        latest_valid(tmp_path)
    config = make_config(tmp_path, runs.path / "data", "run_name=a", f"load_path={folder}")
    with pytest.raises(UserError):
        train(config)
    assert not flag.exists()


def test_nodes_must_share_the_folder(tmp_path: Path) -> None:
    """Known before anything is written; two nodes that see one folder by two names are well."""

    def nodes(*folders: Path) -> list[str]:
        def work() -> None:
            rank = os.environ["RANK"]
            os.environ |= {"NODE_RANK": rank, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            dist.initialize_dist(get_device("cpu"))
            try:
                check_shared(folders[int(rank)] / "runs" / "a")
            except UserError as error:
                (tmp_path / f"said-{rank}").write_text(str(error))

        assert in_processes(work) == [0, 0]
        return [path.read_text() for path in sorted(tmp_path.glob("said-*"))]

    for name in ("one", "two"):
        (tmp_path / name / "runs").mkdir(parents=True)
    (tmp_path / "other").symlink_to(tmp_path / "one")
    assert nodes(tmp_path / "one", tmp_path / "other") == []
    said = nodes(tmp_path / "one", tmp_path / "two")
    assert len(said) == 2
    assert "two/runs/a on node 1 is not node 0's" in said[1]
    assert not [*tmp_path.glob("*/runs/*"), *tmp_path.glob("*/runs/.*")]


def test_a_run_goes_on_as_it_was_saved(runs: Runs) -> None:
    """Composer reads a folder under sharding alone."""
    folder = runs.checkpoint("x2-sharded")
    config = make_config(runs.path, runs.path / "data", "run_name=b", f"load_path={folder}")
    with pytest.raises(UserError, match=r"is a sharded checkpoint; set fsdp_config.state_dict_type=sharded"):
        train(config)
    config.fsdp_config = {"state_dict_type": "sharded"}
    parallel.check_layout(config, folder)
    with pytest.raises(UserError, match=r"set fsdp_config.state_dict_type=full"):
        parallel.check_layout(config, runs.run("x2-one") / "checkpoints" / f"ep0-ba{BATCHES}-rank0.pt")
