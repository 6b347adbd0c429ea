"""Runs of several processes: what is done to them, and which samples they saw."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, get_free_tcp_port
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from train.train_support import ROOT, make_config

from mohd_train.model.llama import Block
from mohd_train.train import parallel
from mohd_train.train import train as build
from mohd_train.train.train import train

PROGRAM = str(ROOT / "tests" / "train" / "distributed_program.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
LAUNCHER = [sys.executable, "-m", "composer.cli", "-n", "2"]


class Crash(Exception):
    """What ends a run from within."""


@dataclass
class Job:
    """One session of a run.

    Attributes:
        folder: of the run's config; it runs in ``folder/runs/{run_name}``.
        data: prepared data.
        overrides: of the config.
        mohd: name of the MoHD config.
        session: its number among those of the run.
        crash, kill: the batch in whose backward pass every rank raises Crash, or rank 0 kills its whole process group.
        stop: the batch in whose backward pass SIGTERM comes to rank 1 alone.
        slow: seconds that every batch waits.
        lose: files under ``data``, as a pattern, that are gone once it trains: after the checks of the start.
        fsdp: whether Composer shards, which it does on GPUs alone: only by asking CUDA for its device, which is answered here.
    """

    folder: str
    data: str
    overrides: list[str] = field(default_factory=list)
    mohd: str = "x2"
    session: int = 1
    crash: int | None = None
    kill: int | None = None
    stop: int | None = None
    slow: float = 0.0
    lose: str | None = None
    fsdp: bool = False


@dataclass
class Place:
    """A folder with data, in which runs of a kind lie, and how one is described.

    Attributes:
        fixed: overrides of every run.
    """

    path: Path
    fixed: ClassVar[tuple[str, ...]] = ()

    def job(self, name: str, mohd: str = "x2", *overrides: str, **values: Any) -> Job:
        # The balance loss is a mean over a microbatch, and which samples share one depends on the number of processes: with
        # one sample each, it is the same mean over samples on any number.
        fixed = [f"run_name={name}", "autoresume=true", "device_train_microbatch_size=1", *self.fixed]
        return Job(str(self.path), str(self.path / "data"), [*fixed, *overrides], mohd, **values)

    def run(self, name: str) -> Path:
        return self.path / "runs" / name


class Seen(Callback):
    """Writes what each rank sees, and does to the run what the job says."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.path = job, folder / f"seen-{dist.get_world_size()}-{dist.get_global_rank()}.jsonl"

    def fit_start(self, state: State, logger: Logger) -> None:
        for path in Path(self.job.data).glob(self.job.lose) if self.job.lose else ():
            path.unlink()
        modules = list(state.model.modules())
        blocks = sum(isinstance(module, Block) for module in modules)
        wrapped = sum(isinstance(module, FullyShardedDataParallel) for module in modules)
        assert wrapped == (blocks + 1 if self.job.fsdp else 0)
        recomputed = sum(isinstance(module, CheckpointWrapper) for module in modules)
        assert recomputed == (blocks if any("activation_checkpointing: true" in o for o in self.job.overrides) else 0)

    def batch_start(self, state: State, logger: Logger) -> None:
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in state.batch["input_ids"]]
        line = {"session": self.job.session, "batch": state.timestamp.batch.value, "rows": rows}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(self.job.slow)

    def after_backward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.job.kill and dist.get_global_rank() == 0:
            os.killpg(0, signal.SIGKILL)
        if state.timestamp.batch.value == self.job.stop and dist.get_global_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.timestamp.batch.value == self.job.crash:
            raise Crash


_to_empty = torch.nn.Module.to_empty


def _to_empty_on_cpu(module: torch.nn.Module, *, device: object, recurse: bool = True) -> torch.nn.Module:
    """Composer gives FSDP's units memory on "cuda:" and the device that it asked for, answered above."""
    return _to_empty(module, device="cpu" if str(device).startswith("cuda") else device, recurse=recurse)


def run(job: Job) -> None:
    """Trains in this process, or in all of this launch."""
    config = make_config(Path(job.folder), Path(job.data), *job.overrides, mohd=job.mohd)
    whole, parallelism = build.build_callbacks, parallel.parallelism_config
    with ExitStack() as patches:
        watch = lambda *args: [*whole(*args), Seen(job, Path(config.run_folder))]  # noqa: E731
        patches.enter_context(mock.patch.object(build, "build_callbacks", watch))
        if job.fsdp:
            as_gpu = mock.patch.object(
                parallel, "parallelism_config", lambda config, device: parallelism(config, "gpu")
            )
            patches.enter_context(as_gpu)
            patches.enter_context(mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")))
            patches.enter_context(mock.patch.object(torch.nn.Module, "to_empty", _to_empty_on_cpu))
        if config.compile:  # all but code generation
            torch._dynamo.reset()
            counters.clear()
            traced = functools.partial(torch.compile, backend="aot_eager")
            patches.enter_context(mock.patch.object(torch, "compile", traced))
        try:
            train(config)
        except Crash:
            assert job.crash is not None
        if config.compile:
            found = {"graphs": counters["stats"]["unique_graphs"], "breaks": list(counters["graph_break"])}
            (Path(config.run_folder) / "graphs.json").write_text(json.dumps(found))


def seen(folder: Path) -> dict[int, list[str]]:
    """Samples of each batch, in the order of the ranks, as the last session that did the batch saw them."""
    found: dict[int, tuple[int, dict[str, list[str]]]] = {}
    for path in sorted(folder.glob("seen-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            session, rows = found.get(line["batch"], (0, {}))
            if line["session"] > session:
                rows = {}
            if line["session"] >= session:
                found[line["batch"]] = (line["session"], rows | {path.name: line["rows"]})
    return {batch: [row for part in rows.values() for row in part] for batch, (_, rows) in sorted(found.items())}


def start(*jobs: Job, launcher: list[str] = LAUNCHER) -> subprocess.Popen[str]:
    """Composer's launcher with two processes that do the jobs, one after another, as a process group of its own."""
    described = json.dumps([dataclasses.asdict(job) for job in jobs])
    return subprocess.Popen(
        [*launcher, PROGRAM, described],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def jobs_of(argument: str) -> Iterator[Job]:
    """The jobs of a launch."""
    values: list[dict[str, Any]] = json.loads(argument)
    return (Job(**value) for value in values)


def in_processes(work: Callable[[], None], count: int = 2, timeout: float = 180) -> list[int | None]:
    """Exit codes of ``count`` ranks that do ``work``: what Composer's launcher does, but forked, which spares the imports."""
    port = get_free_tcp_port()

    def rank_of(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in (places | {"MASTER_PORT": port}).items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        work()

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
        os.setpgid(process.pid or 0, ranks[0].pid or 0)  # as the launcher's: a group that one signal ends
    limit = time.monotonic() + timeout
    for process in ranks:
        process.join(max(limit - time.monotonic(), 0.1))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def run_in(count: int, *jobs: Job) -> None:
    """Does the jobs, one after another, in processes that end well."""

    def work() -> None:
        for job in jobs:
            run(job)

    codes = in_processes(work, count)
    assert codes == [0] * count, codes
