"""From a config to a Composer Trainer: checks first, the cheap ones before the slow, then the parts."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Callback, Time, TimeUnit
from composer.utils import dist, get_device, parse_uri

import mohd_train
from mohd_train.config.load import to_yaml
from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import Config
from mohd_train.data.manifest import TOKENIZER_FOLDER, Manifest, write_atomic
from mohd_train.errors import UserError
from mohd_train.model.count import Counts, count
from mohd_train.model.transformer import Transformer
from mohd_train.train import parallel, registry
from mohd_train.train.callbacks import DomainMix, MetricsFile, Progress, RoutingStatistics, RunRecorder, ValidationTotal
from mohd_train.train.checkpoint import LATEST, RunMetadata, check_checkpoint, newest_whole, point_latest, whole_run
from mohd_train.train.composer_model import MoHDComposerModel
from mohd_train.train.data import TrainData, build_data, check_on_nodes, on_rank_zero
from mohd_train.train.logs import log_to_folder
from mohd_train.train.optimizer import build_optimizer, build_scheduler
from mohd_train.train.record import RunRecord, check_folder, check_writable, code_version, hardware, now, versions

CHECKPOINT_NAME = "ep{epoch}-ba{batch}-rank{rank}.pt"


@dataclass
class Run:
    """A checked run, nothing of it built yet.

    Attributes:
        config, plan, counts, manifest: what it is.
        device: ``cpu`` or ``gpu``.
        earlier: the record of this run's earlier sessions, or None for a new run.
        resumes: the checkpoint of an earlier session that this one goes on from.
        skipped: newer checkpoints that are broken, each with the reason.
    """

    config: Config
    plan: ModelPlan
    counts: Counts
    manifest: Manifest
    device: str
    earlier: RunRecord | None = None
    resumes: Path | None = None
    skipped: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run_folder)

    @property
    def finished(self) -> bool:
        """Whether an earlier session has trained it to its end."""
        return self.earlier is not None and self.earlier.data["status"] == "finished"


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
    check_writable(Path(config.run_folder))
    if not is_remote(config.save_folder):
        check_writable(Path(config.save_folder))
    plan = make_plan(config.model, config.mohd, config.max_seq_len)
    manifest = check_on_nodes(config)
    run = Run(config, plan, count(plan, config.max_seq_len), manifest, device)
    on_rank_zero(lambda: _check_folder_and_checkpoint(run))
    box = [(run.earlier, run.resumes)]
    dist.broadcast_object_list(box)
    run.earlier, run.resumes = box[0]
    return run


def _check_folder_and_checkpoint(run: Run) -> None:
    """Whose the run folder is, what to go on from, and whether that is of this model."""
    config, sha256 = run.config, run.manifest.tokenizer.sha256
    run.earlier = check_folder(config, run.manifest.sha256())
    if run.earlier is not None and not is_remote(config.save_folder):
        run.resumes, run.skipped = newest_whole(Path(config.save_folder))
    source = str(run.resumes) if run.resumes else config.load_path
    if source is not None:
        check_checkpoint(source, run.plan, parameter_shapes(run.plan), sha256)


def is_remote(path: str) -> bool:
    """Whether Composer would upload to ``path``."""
    return bool(parse_uri(path)[0])


def parameter_shapes(plan: ModelPlan) -> dict[str, torch.Size]:
    """Every parameter's shape, from a model on the meta device."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(plan).state_dict().items()}


def open_folder(run: Run) -> RunRecord:
    """Takes the run folder: the record of this session, a copy of the tokenizer, the config. Rank 0 alone.

    Raises:
        UserError: the folder can't be written.
    """
    config, folder = run.config, run.folder
    local_save = not is_remote(config.save_folder)
    try:
        for path in (folder, Path(config.save_folder)) if local_save else (folder,):
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        if config.save_overwrite and run.earlier is None and local_save:
            _remove_checkpoints(Path(config.save_folder))
        if run.resumes is not None:
            point_latest(run.resumes)
        beside = Path(config.save_folder).parent if local_save else folder
        shutil.copytree(Path(config.data.local) / TOKENIZER_FOLDER, beside / TOKENIZER_FOLDER, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(
            f"can't write to {error.filename or folder} ({error.strerror}); choose another run_folder"
        ) from error
    write_atomic(folder / "config.yaml", to_yaml(config).encode())
    record = run.earlier or RunRecord(folder, {"run_name": config.run_name, "started": now(), "sessions": []})
    session = {
        "started": now(),
        "hardware": hardware(run.device, dist.get_world_size()),
        "from": str(run.resumes or config.load_path or "") or None,
    }
    record.update(
        status="running",
        error=None,
        ended=None,
        seed=config.seed,
        config=dataclasses.asdict(config),
        plan=run.plan.to_dict(),
        parameters=run.counts.to_dict(),
        code=code_version(),
        versions=versions(),
        data={"folder": config.data.local, "sha256": run.manifest.sha256(), **run.manifest.summary()},
        sessions=[*record.data["sessions"], session],
        batch=record.data.get("batch", 0),
        tokens=record.data.get("tokens", 0),
    )
    return record


def _remove_checkpoints(folder: Path) -> None:
    """Checkpoints of the run that a new one replaces: autoresume must never find them."""
    for path in [*folder.glob("ep*-ba*-rank*.pt"), folder / LATEST]:
        path.unlink(missing_ok=True)


def build_model(run: Run) -> MoHDComposerModel:
    """The model with weights that depend on the seed alone: not on the number of processes, nor on DDP or FSDP.

    It is built in memory in every process, since initialization on the meta device would draw other numbers on other devices.
    """
    model = Transformer(run.plan, kernels=run.config.kernels, seed=run.config.seed)
    parallel.mark_blocks(model)
    return MoHDComposerModel(model, run.counts.flops_per_token)


def _line_interval(interval: str | None, steps_per_epoch: int) -> int | None:
    if interval is None:
        return None
    time = Time.from_timestring(interval)
    return int(time.value) * (steps_per_epoch if time.unit == TimeUnit.EPOCH else 1)


def build_callbacks(run: Run, data: TrainData) -> list[Callback]:
    """Ours, then Composer's. The order matters: the total stands before the progress line that shows it."""
    config = run.config
    total = ValidationTotal()
    callbacks: list[Callback] = [total, DomainMix(list(data.mix.domains))]
    if run.plan.components:
        callbacks.append(RoutingStatistics(run.plan, int(Time.from_timestring(config.routing_log_interval).value)))
    interval = _line_interval(config.console_log_interval, data.steps_per_epoch)
    metadata: dict[str, Any] = {
        "version": mohd_train.__version__,
        "run_name": config.run_name,
        "plan": run.plan.to_dict(),
        "tokenizer_sha256": run.manifest.tokenizer.sha256,
        "seq_len": run.manifest.seq_len,
        "config": dataclasses.asdict(config),
    }
    progress = Progress(data.steps, total, bar=config.progress_bar, interval=interval)
    return [*callbacks, *registry.build_callbacks(config.callbacks), progress, RunMetadata(metadata)]


def _saving(config: Config) -> dict[str, Any]:
    """The Trainer's arguments about checkpoints."""
    return {
        "save_folder": config.save_folder,
        "save_filename": CHECKPOINT_NAME,
        "save_latest_filename": LATEST.replace("rank0", "rank{rank}"),
        "save_interval": config.save_interval,
        "save_num_checkpoints_to_keep": config.save_num_checkpoints_to_keep,
        # The folder is this run's by now; what lies after the resumed batch was cut short and is written again.
        "save_overwrite": config.save_overwrite or config.autoresume,
        "autoresume": config.autoresume,
    }


def build_trainer(run: Run, data: TrainData, record: RunRecord | None, run_id: str) -> tuple[Trainer, RunRecorder]:
    """Composer's Trainer, with the checkpoint loaded where there is one to go on from."""
    config, device = run.config, run.device
    log_to_folder(run.folder, config.python_log_level)
    # Deterministic mode would also fill what torch.empty returns, at a cost; nothing here reads memory it hasn't written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model = build_model(run)
    metrics = MetricsFile(run.folder / "metrics.jsonl")
    clipping = config.gradient_clipping
    trainer = Trainer(
        model=model,
        train_dataloader=data.train,
        eval_dataloader=data.evaluators or None,
        eval_interval=config.eval_interval,
        eval_subset_num_batches=config.eval_subset_num_batches,
        max_duration=config.max_duration,
        optimizers=build_optimizer(model, config.optimizer),
        schedulers=build_scheduler(config.scheduler, config.max_duration),
        algorithms=[GradientClipping("norm", clipping)] if clipping is not None else None,
        callbacks=build_callbacks(run, data),
        loggers=[metrics, *registry.build_loggers(config.loggers, run.folder, run_id)],
        run_name=config.run_name,
        progress_bar=False,
        load_path=config.load_path,
        load_weights_only=config.load_weights_only,
        load_progress_bar=False,
        **_saving(config),
        parallelism_config=parallel.parallelism_config(config, device),
        device=device,
        precision=config.precision,
        device_train_microbatch_size=parallel.microbatch_size(config, device),
        seed=config.seed,
        deterministic_mode=config.deterministic,
        dist_timeout=config.dist_timeout,
        python_log_level=config.python_log_level,
        compile_config={} if config.compile else None,
    )
    trainer.logger.log_hyperparameters({"config": dataclasses.asdict(config), "plan": run.plan.to_dict()})
    saver = trainer._checkpoint_saver
    assert saver is not None
    if record is not None and run.resumes is not None:  # Composer forgets them, and would keep K more for each session
        saver.saved_checkpoints[:0] = whole_run(run.resumes)
    recorder = RunRecorder(record, saver, metrics)
    trainer.state.callbacks.append(recorder)
    return trainer, recorder


def build(config: Config) -> Trainer:
    """Checks ``config``, takes its run folder and returns the Trainer, ready to ``fit``.

    Raises:
        UserError: bad input, before anything is written.
    """
    run = prepare(config)
    record = start(run)
    return build_trainer(run, build_data(config, run.manifest), record, share_run_id(record))[0]


def start(run: Run) -> RunRecord | None:
    """:func:`open_folder` on rank 0; None elsewhere."""
    return on_rank_zero(lambda: open_folder(run))


def share_run_id(record: RunRecord | None) -> str:
    """The run's id from rank 0."""
    box = [record.run_id if record else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]
