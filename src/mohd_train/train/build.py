"""From a checked run to a Composer Trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Callback, Time, TimeUnit
from composer.utils import dist

import mohd_train
from mohd_train.config.schema import Config
from mohd_train.model.init import initializer
from mohd_train.model.llama import Transformer
from mohd_train.run_folder.paths import CHECKPOINT_FILE, LATEST, METRICS, local_save_folder
from mohd_train.run_folder.record import RunRecord
from mohd_train.run_folder.secrets import shown
from mohd_train.storage import Storage, is_remote
from mohd_train.train import parallel, registry
from mohd_train.train.callbacks import (
    DomainMix,
    LossGuard,
    MetricsFile,
    Progress,
    RouterCollapse,
    RoutingStatistics,
    RunRecorder,
    Uploads,
    ValidationTotal,
    WorkerWatch,
)
from mohd_train.train.checkpoint import RunMetadata, whole_run
from mohd_train.train.composer_model import MoHDComposerModel
from mohd_train.train.data import TrainData, build_data, on_rank_zero
from mohd_train.train.faults import Notices
from mohd_train.train.folder import open_folder
from mohd_train.train.logs import log_to_folder
from mohd_train.train.optimizer import build_optimizer, build_scheduler
from mohd_train.train.preemption import Preemption, StopSignal
from mohd_train.train.prepare import Run, prepare
from mohd_train.train.saver import CheckpointSaver


def build_model(run: Run) -> MoHDComposerModel:
    """The model with weights that depend on the seed alone: not on the number of processes, nor on DDP or FSDP.

    It is built on the meta device. FSDP gives memory to one unit at a time and calls ``param_init_fn``, so that no
    process ever holds the whole model; otherwise it goes straight to the device it trains on.
    """
    with torch.device("meta"):
        model = Transformer(run.plan, kernels=run.config.kernels)
    fill = initializer(model, run.plan, run.config.seed)
    if run.config.fsdp_config is not None:
        model.param_init_fn = fill  # type: ignore[assignment]  # Composer looks for it by this name
    else:
        model.to_empty(device="cuda" if run.device == "gpu" else "cpu").apply(fill)
    parallel.mark_blocks(model)
    return MoHDComposerModel(model, run.counts.flops_per_token)


def _line_interval(interval: str | None, steps_per_epoch: int) -> int | None:
    if interval is None:
        return None
    time = Time.from_timestring(interval)
    return int(time.value) * (steps_per_epoch if time.unit == TimeUnit.EPOCH else 1)


def build_callbacks(run: Run, data: TrainData, notice: Notices, saver: CheckpointSaver) -> list[Callback]:
    """Ours, then Composer's. The order matters: the total stands before the progress line that shows it."""
    config = run.config
    total = ValidationTotal()
    callbacks: list[Callback] = [total, DomainMix(list(data.mix.domains))]
    callbacks.append(LossGuard(config.nonfinite_loss, config.loss_spike_factor, notice, lambda: saver.newest))
    if run.plan.components:
        statistics = RoutingStatistics(run.plan, int(Time.from_timestring(config.routing_log_interval).value))
        callbacks.append(statistics)
        if config.router_collapse != "ignore":
            batches, stop = (
                int(Time.from_timestring(config.router_collapse_time).value),
                config.router_collapse == "stop",
            )
            share = config.router_collapse_share
            callbacks.append(RouterCollapse(statistics, share=share, batches=batches, stop=stop, notice=notice))
    interval = _line_interval(config.console_log_interval, data.steps_per_epoch)
    metadata: dict[str, Any] = {
        "version": mohd_train.__version__,
        "run_name": config.run_name,
        "plan": run.plan.to_dict(),
        "tokenizer_sha256": run.manifest.tokenizer.sha256,
        "seq_len": run.manifest.seq_len,
        "config": dataclasses.asdict(shown(config)),
    }
    progress = Progress(data.steps, total, bar=config.progress_bar, interval=interval)
    return [
        *callbacks,
        *registry.build_callbacks(config.callbacks),
        progress,
        RunMetadata(metadata, text=parallel.is_sharded(config)),
    ]


def build_saver(run: Run) -> CheckpointSaver:
    """The saver, which knows the checkpoints of earlier sessions: else each session would keep K more."""
    config = run.config
    keep = config.save_num_checkpoints_to_keep
    saver = CheckpointSaver(
        keep_every=config.save_keep_every,
        folder=str(local_save_folder(config)),
        filename=CHECKPOINT_FILE,
        remote_file_name=None,  # see Uploads
        latest_filename=LATEST.replace("rank0", "rank{rank}"),
        latest_remote_file_name=None,
        # The folder is this run's by now; what lies after the resumed batch was cut short and is written again.
        overwrite=config.save_overwrite or config.autoresume,
        save_interval=config.save_interval,
        num_checkpoints_to_keep=keep or 1,  # 0 is for remote folders: the newest one stays until the next
    )
    if run.goes_on and not run.brought.goes_on and run.resumes is not None and parallel.is_rank_zero():
        saver.saved_checkpoints[:] = whole_run(run.resumes)
    saver.newest = (run.source or None) if run.goes_on else None
    return saver


@dataclass
class Built:
    """What a run consists of once it is built: ``preemption``, ``recorder`` and ``uploads`` are asked at its end."""

    trainer: Trainer
    saver: CheckpointSaver
    preemption: Preemption
    recorder: RunRecorder
    uploads: Uploads | None
    worker_watch: WorkerWatch


def build_trainer(run: Run, data: TrainData, record: RunRecord | None, run_id: str, stop: StopSignal) -> Built:
    """Composer's Trainer, with the checkpoint loaded where there is one to go on from."""
    config, device = run.config, run.device
    log_to_folder(run.folder, config.python_log_level)
    # Deterministic mode would also fill what torch.empty returns, at a cost; nothing here reads memory it hasn't
    # written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model = build_model(run)
    metrics = MetricsFile(run.folder / METRICS)
    saver = build_saver(run)
    recorder = RunRecorder(record, saver, metrics)
    preemption = Preemption(stop, saver, recorder)
    notice = Notices(record)
    uploads = None
    if record is not None and is_remote(config.save_folder):
        uploads = Uploads(Storage(config.save_folder), run.folder, saver, notice)
    worker_watch = WorkerWatch(config.data.worker_timeout if config.data.num_workers else 0)
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
        # A checkpoint is saved first, then recorded, and only then is it known whether the run was asked to stop.
        callbacks=[
            *build_callbacks(run, data, notice, saver),
            saver,
            recorder,
            *([uploads] if uploads is not None else []),
            preemption,
            worker_watch,
        ],
        loggers=[metrics, *registry.build_loggers(config.loggers, run.folder, run_id)],
        run_name=config.run_name,
        progress_bar=False,
        load_path=str(run.resumes) if run.resumes else None,
        load_weights_only=config.load_weights_only and not run.goes_on,
        load_progress_bar=False,
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
    plain = {"config": dataclasses.asdict(shown(config)), "plan": run.plan.to_dict()}
    trainer.logger.log_hyperparameters(plain)
    return Built(trainer, saver, preemption, recorder, uploads, worker_watch)


def build(config: Config) -> Trainer:
    """Checks ``config``, takes its run folder (until this process ends) and returns the Trainer, ready to ``fit``.

    Raises:
        UserError: bad input, before anything is written.
    """
    run = prepare(config)
    record = start(run)
    return build_trainer(run, build_data(config, run.manifest), record, share_run_id(record), StopSignal()).trainer


def start(run: Run) -> RunRecord | None:
    """:func:`open_folder` on rank 0; None elsewhere."""
    return on_rank_zero(lambda: open_folder(run))


def share_run_id(record: RunRecord | None) -> str:
    """The run's id from rank 0."""
    box = [record.run_id if record else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]
