"""A run before anything of it is built: every check, the cheap ones before the slow, and what it goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from composer.utils import dist, get_device

from mohd_train.checkpoint import resolve
from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import Config
from mohd_train.data.manifest import TOKENIZER_FOLDER, Manifest
from mohd_train.errors import UserError
from mohd_train.model.count import Counts, count
from mohd_train.model.llama import Transformer
from mohd_train.run_folder.paths import local_save_folder
from mohd_train.run_folder.record import RunRecord, check_folder, check_writable
from mohd_train.storage import is_remote, refuse_remote
from mohd_train.train import parallel, registry
from mohd_train.train.checkpoint import check_checkpoint, newest_whole
from mohd_train.train.data import check_on_nodes, on_rank_zero
from mohd_train.train.folder import check_shared
from mohd_train.train.lock import RunLock
from mohd_train.train.optimizer import build_scheduler
from mohd_train.train.remote import Brought, bring


@dataclass
class Run:
    """A checked run, nothing of it built yet.

    Attributes:
        config, plan, counts, manifest: what it is.
        device: ``cpu`` or ``gpu``.
        earlier: the record of this run's earlier sessions, or None for a new run.
        resumes: the checkpoint that is loaded: of an earlier session, else of ``load_path``; a copy where it is remote.
        brought: what came from remote storage, to this node.
        source: where that is from, for messages; empty where there is none.
        skipped: newer checkpoints that are broken, each with the reason.
        lock: of the folder, on rank 0, once it is taken.
    """

    config: Config
    plan: ModelPlan
    counts: Counts
    manifest: Manifest
    device: str
    earlier: RunRecord | None = None
    resumes: Path | None = None
    brought: Brought = field(default_factory=Brought)
    source: str = ""
    goes_on: bool = False  # from an earlier session of this run, and not from another run's checkpoint
    skipped: list[str] = field(default_factory=list)
    lock: RunLock | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run_folder)

    @property
    def finished(self) -> bool:
        """Whether an earlier session has trained it to its end."""
        return self.earlier is not None and self.earlier.data["status"] == "finished"

    def release(self) -> None:
        """Gives the folder back, where it is held."""
        if self.lock is not None:
            self.lock.release()


def prepare(config: Config) -> Run:
    """Runs every check that needs no model. Writes nothing.

    Raises:
        UserError: for the first thing that is wrong.
    """
    device = parallel.resolve_device(config.device)
    parallel.check_precision(config.precision, device)
    parallel.microbatch_size(config, device)
    parallel.parallelism_config(config, device)
    build_scheduler(config.scheduler, config.max_duration)
    registry.check_loggers(config.loggers)
    registry.check_callbacks(config.callbacks)
    if parallel.world_size() > 1:
        dist.initialize_dist(get_device(device), config.dist_timeout)
    refuse_remote(config.run_folder, "run_folder", "set save_folder to that address, and the run's files go there too")
    check_writable(Path(config.run_folder))
    check_writable(local_save_folder(config))
    if parallel.is_sharded(config) and dist.get_world_size() > dist.get_local_world_size():
        check_shared(local_save_folder(config))
    plan = make_plan(config.model, config.mohd, config.max_seq_len)
    parallel.resolve_kernels(config, plan, device)
    manifest = check_on_nodes(config)
    run = Run(config, plan, count(plan, config.max_seq_len), manifest, device)
    if is_remote(config.save_folder) or is_remote(config.load_path or ""):
        run.brought = bring(config)
    try:
        on_rank_zero(lambda: _check_folder_and_checkpoint(run))
    except UserError:
        run.release()
        raise
    box = [(run.earlier, run.source, run.goes_on, run.resumes, run.skipped)]
    dist.broadcast_object_list(box)
    run.earlier, run.source, run.goes_on, resumes, run.skipped = box[0]
    remote = run.source != "" and run.source == run.brought.source
    run.resumes = run.brought.checkpoint if remote else resumes  # each node has a copy of its own
    return run


def _check_folder_and_checkpoint(run: Run) -> None:
    """Whose the run folder is, what to go on from, and whether that is of this model."""
    config, sha256 = run.config, run.manifest.tokenizer.sha256
    if run.folder.is_dir():
        run.lock = RunLock(run.folder)
    run.earlier = check_folder(config, run.manifest.sha256())
    brought = run.brought
    if brought.record is not None:
        stored = check_folder(config, run.manifest.sha256(), brought.record)
        if brought.goes_on or run.earlier is None:
            run.earlier = stored
    if brought.goes_on:
        run.resumes, run.source, run.skipped, run.goes_on = brought.checkpoint, brought.source, brought.skipped, True
    elif run.earlier is not None:
        run.resumes, run.skipped = newest_whole(local_save_folder(config))
        run.goes_on = run.resumes is not None
    if run.resumes is None and config.load_path:
        run.resumes, run.source = brought.checkpoint or resolve(Path(config.load_path)), config.load_path
    if run.resumes is not None:
        run.source = run.source or str(run.resumes)
        tokenizer = Path(config.data.local) / TOKENIZER_FOLDER
        check_checkpoint(str(run.resumes), run.plan, parameter_shapes(run.plan), sha256, tokenizer)
        parallel.check_layout(config, run.resumes)


def parameter_shapes(plan: ModelPlan) -> dict[str, torch.Size]:
    """Every parameter's shape, from a model on the meta device."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(plan).state_dict().items()}
