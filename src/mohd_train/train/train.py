"""A run from its config to its end: what ``scripts/train.py`` calls.

check        everything that can be wrong and needs no model, before anything is written
open_folder  the lock, this session's record, the tokenizer
build        data, model, callbacks in their order, Composer's Trainer with the checkpoint to resume from
fit          validation that is due, training
end          how it ended, in run.json; what a fault means for the user
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Callback, Time, TimeUnit
from composer.utils import dist, get_device

import mohd_train
from mohd_train import compat
from mohd_train.checkpoint import resume
from mohd_train.checkpoint.resume import ResumePoint
from mohd_train.checkpoint.save import CheckpointSaver, RunMetadata
from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import Config
from mohd_train.data.manifest import TOKENIZER_FOLDER, Manifest
from mohd_train.errors import UserError
from mohd_train.model.count import Counts, count
from mohd_train.model.init import initializer
from mohd_train.model.llama import Transformer
from mohd_train.run_folder.paths import CHECKPOINT_FILE, LATEST, METRICS, RECORD, local_save_folder
from mohd_train.run_folder.record import RunRecord, check_folder, check_save_folder, check_writable
from mohd_train.run_folder.secrets import shown
from mohd_train.storage import Storage, is_remote, refuse_remote
from mohd_train.train import parallel, registry
from mohd_train.train.callbacks import (
    DomainMix,
    FirstBatchWatchdog,
    KernelSizes,
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
from mohd_train.train.callbacks.uploads import TakenOver, complete
from mohd_train.train.composer_model import MoHDComposerModel
from mohd_train.train.data import TrainData, build_data, check_on_nodes
from mohd_train.train.faults import Notices, explain, settle_workers
from mohd_train.train.folder import RunLock, check_shared, open_folder
from mohd_train.train.logs import log_to_folder
from mohd_train.train.optimizer import build_optimizer, build_scheduler
from mohd_train.train.stopping import Preempted, Preemption, StopRequest, stop_request
from mohd_train.train.summary import say, summary
from mohd_train.utils.distributed import from_first_of_node, from_rank_zero, on_rank_zero
from mohd_train.utils.terminal import unbreakable_output

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Trains ``config`` to its end, or resumes it if autoresume finds a checkpoint.

    ``run.json`` says how it ended: ``finished``, ``stopped`` (by a callback, before its end), ``preempted`` (SIGTERM,
    SIGHUP, SIGUSR1: saved, and returns), ``interrupted`` (Ctrl-C: saved) or ``failed``; a killed run stays ``running``.

    Raises:
        UserError: bad input, in which case nothing has been written, unless only loading could reveal it; or a fault
            while
            training that the user can do something about.
    """
    watchdog = FirstBatchWatchdog(Path(config.run_folder), config.start_timeout)
    watchdog.start()
    lock = RunLock(Path(config.run_folder), local_save_folder(config))
    try:
        with unbreakable_output(), stop_request() as stop:
            try:
                _train(check(config, lock), lock, stop, watchdog)
            except Preempted as preempted:
                say(f"stopped by {preempted}: {config.run_folder} resumes with autoresume=true")
    finally:
        watchdog.cancel()
        lock.release()


def dry_run(config: Config) -> None:
    """Every check, and the parts that can be built without writing: data, model, optimizer. Raises UserError as a run
    would."""
    lock = RunLock(Path(config.run_folder), local_save_folder(config))
    try:
        run = check(config, lock)
    finally:
        lock.release()
    data = build_data(config, run.manifest)
    build_optimizer(build_model(run), config.optimizer)
    say(summary(run, data))
    say("dry run: all checks passed; nothing was written")


@dataclass(frozen=True)
class Run:
    """A checked run, before anything is built.

    Attributes:
        device: ``cpu`` or ``gpu``.
        previous_record: of this run's earlier sessions; None for a new run.
        start: the checkpoint it starts from, if any.
    """

    config: Config
    plan: ModelPlan
    counts: Counts
    manifest: Manifest
    device: str
    previous_record: RunRecord | None
    start: ResumePoint

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run_folder)

    @property
    def is_finished(self) -> bool:
        """Whether an earlier session trained it to its end."""
        return self.previous_record is not None and self.previous_record.data["status"] == "finished"


def check(config: Config, lock: RunLock) -> Run:
    """Runs every check that needs no model, the cheap ones first, and finds what to resume from. Writes nothing.

    Raises:
        UserError: for the first thing that is wrong.
    """
    device = parallel.resolve_device(config.device)
    parallel.check_precision(config.precision, device)
    parallel.check_seed(config.seed)
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
    parallel.resolve_loss(config, device)
    manifest = check_on_nodes(config)
    downloaded = ResumePoint()
    if is_remote(config.save_folder) or is_remote(config.load_path or ""):
        downloaded = from_first_of_node(lambda: resume.download(config))

    def previous_and_start() -> tuple[RunRecord | None, ResumePoint]:
        lock.take_existing()
        previous = _previous_record(config, manifest, downloaded)
        start = resume.choose(config, downloaded, has_trained=previous is not None)
        _check_nothing_lost(config, previous, start)
        if start.checkpoint is not None:
            tokenizer = Path(config.data.local) / TOKENIZER_FOLDER
            shapes, sha256 = parameter_shapes(plan), manifest.tokenizer.sha256
            resume.check_checkpoint(start, config, plan, shapes, sha256, tokenizer)
            parallel.check_layout(config, start.checkpoint)
        return previous, start

    previous, start = from_rank_zero(previous_and_start)
    # Each node has its own copies.
    checkpoint = downloaded.checkpoint if start.source == downloaded.source else start.checkpoint
    start = dataclasses.replace(start, checkpoint=checkpoint, metrics=downloaded.metrics, scratch=downloaded.scratch)
    return Run(config, plan, count(plan, config.max_seq_len), manifest, device, previous, start)


def _previous_record(config: Config, manifest: Manifest, downloaded: ResumePoint) -> RunRecord | None:
    """The record to continue, the run folder's or that on storage. Raises UserError if the folder is another
    run's."""
    check_save_folder(config)
    previous = check_folder(config, manifest.sha256())
    if downloaded.stored_record is not None:
        stored = check_folder(config, manifest.sha256(), downloaded.stored_record)
        if downloaded.is_resuming or previous is None:
            return stored
    return previous


def _check_nothing_lost(config: Config, previous: RunRecord | None, start: ResumePoint) -> None:
    """Refuses to restart a run whose record names checkpoints that are not there."""
    saved = 0 if previous is None or previous.data["status"] == "finished" else previous.data.get("batch", 0)
    if saved and not start.is_resuming:
        raise UserError(
            f"{config.run_folder}/{RECORD} says that batch {saved} was saved, but there is no checkpoint in {config.save_folder} "
            "(a disk that is not mounted, or another save_folder?); restore it, or set save_overwrite=true and "
            "autoresume=false to start over"
        )


def parameter_shapes(plan: ModelPlan) -> dict[str, torch.Size]:
    """Every parameter's shape, from a model on the meta device."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(plan).state_dict().items()}


def _train(run: Run, lock: RunLock, stop: StopRequest, watchdog: FirstBatchWatchdog) -> None:
    config = run.config
    if run.is_finished:
        say(f"{run.folder}: this run is already finished; nothing to do (set another run_name for a new one)")
        on_rank_zero(lambda: complete(config, run.start.stored_record))
        return
    if "wandb" in registry.check_loggers(config.loggers) and registry.wandb_is_offline():
        say(f"W&B records offline (no API key); upload later with `wandb sync {run.folder}/wandb/offline-run-*`")
    record = on_rank_zero(lambda: open_folder(run, lock))
    built = None
    try:
        data = build_data(config, run.manifest)
        say(summary(run, data))
        built = build_trainer(run, data, record, stop)
        run.start.forget_copies()
        built.trainer.state.callbacks.append(watchdog)
        _fit(run, data, built)
    except BaseException as error:
        fault = _end_early(run, built, record, error)
        if fault is not None:
            raise fault from error
        raise
    if built.uploads is not None:
        built.uploads.finish()
    say(f"finished: {run.folder}/run.json · {built.saver.newest or 'no new checkpoint'}")


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


@dataclass
class Built:
    """The Trainer, and those of its callbacks that are needed at the end."""

    trainer: Trainer
    saver: CheckpointSaver
    preemption: Preemption
    recorder: RunRecorder
    uploads: Uploads | None
    worker_watch: WorkerWatch


def build_trainer(run: Run, data: TrainData, record: RunRecord | None, stop: StopRequest) -> Built:
    """Composer's Trainer, with the checkpoint loaded if there is one to resume from.

    Args:
        record: on rank 0; None elsewhere.
    """
    config, device = run.config, run.device
    log_to_folder(run.folder, config.python_log_level)
    compat.deterministic_without_filling_memory()
    model = build_model(run)
    metrics = MetricsFile(run.folder / METRICS, stop.because_of)
    saver = build_saver(run)
    recorder = RunRecorder(record, saver, metrics)
    preemption = Preemption(stop, saver, recorder)
    notice = Notices(record)
    uploads = None
    if record is not None and is_remote(config.save_folder):
        uploads = Uploads(Storage(config.save_folder), run.folder, saver, notice)
    worker_watch = WorkerWatch(config.data.worker_timeout if config.data.num_workers else 0)
    clipping = config.gradient_clipping
    run_id = from_rank_zero(lambda: record.run_id if record else "")
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
        # The order matters: a checkpoint is saved, then recorded, then uploaded, and only then may the run be asked to
        # stop.
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
        load_path=str(run.start.checkpoint) if run.start.checkpoint else None,
        load_weights_only=config.load_weights_only and not run.start.is_resuming,
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
    trainer.logger.log_hyperparameters({"config": dataclasses.asdict(shown(config)), "plan": run.plan.to_dict()})
    return Built(trainer, saver, preemption, recorder, uploads, worker_watch)


def build_callbacks(run: Run, data: TrainData, notice: Notices, saver: CheckpointSaver) -> list[Callback]:
    """Ours, then Composer's, in this order: a number is computed before what shows it or acts on it."""
    config = run.config
    total = ValidationTotal()
    callbacks: list[Callback] = [total, DomainMix(list(data.mix.domains))]
    callbacks.append(LossGuard(config.nonfinite_loss, config.loss_spike_factor, notice, lambda: saver.newest))
    if "triton" in parallel.resolve_kernels(config, run.plan, run.device):
        callbacks.append(KernelSizes(notice))
    if run.plan.routed:
        statistics = RoutingStatistics(run.plan, int(Time.from_timestring(config.routing_log_interval).value))
        callbacks.append(statistics)
        if config.router_collapse != "ignore":
            batches = int(Time.from_timestring(config.router_collapse_time).value)
            share, stop = config.router_collapse_share, config.router_collapse == "stop"
            callbacks.append(RouterCollapse(statistics, share=share, batches=batches, stop=stop, notice=notice))
    metadata: dict[str, Any] = {
        "version": mohd_train.__version__,
        "run_name": config.run_name,
        "plan": run.plan.to_dict(),
        "tokenizer_sha256": run.manifest.tokenizer.sha256,
        "seq_len": run.manifest.seq_len,
        "config": dataclasses.asdict(shown(config)),
    }
    interval = _line_interval(config.console_log_interval, data.steps_per_epoch)
    return [
        *callbacks,
        *registry.build_callbacks(config.callbacks),
        Progress(data.steps, total, bar=config.progress_bar, interval=interval),
        RunMetadata(metadata, text=parallel.is_sharded(config)),
    ]


def _line_interval(interval: str | None, steps_per_epoch: int) -> int | None:
    if interval is None:
        return None
    time = Time.from_timestring(interval)
    return int(time.value) * (steps_per_epoch if time.unit == TimeUnit.EPOCH else 1)


def build_saver(run: Run) -> CheckpointSaver:
    """The saver, which knows the checkpoints of earlier sessions: otherwise each session would keep K more."""
    config, start = run.config, run.start
    saver = CheckpointSaver(
        keep_every=config.save_keep_every,
        folder=str(local_save_folder(config)),
        filename=CHECKPOINT_FILE,
        remote_file_name=None,  # see Uploads
        latest_filename=LATEST.replace("rank0", "rank{rank}"),
        latest_remote_file_name=None,
        # The folder is this run's now; whatever follows the resumed batch was cut short and is written again.
        overwrite=config.save_overwrite or config.autoresume,
        save_interval=config.save_interval,
        num_checkpoints_to_keep=config.save_num_checkpoints_to_keep or 1,  # 0: on storage only; the newest stays here
    )
    if start.is_resuming and start.scratch is None and start.checkpoint is not None and parallel.is_rank_zero():
        saver.saved_checkpoints[:] = resume.up_to(start.checkpoint)
    saver.newest = (start.source or None) if start.is_resuming else None
    return saver


def _fit(run: Run, data: TrainData, built: Built) -> None:
    config, trainer = run.config, built.trainer
    resumed = trainer.state.timestamp.batch.value
    for line in run.start.skipped:
        say(f"skipped a broken checkpoint: {line}")
    if run.start.source:
        say(f"resuming from {run.start.source}, batch {resumed}")
    is_done = resumed >= data.steps
    if is_done and not run.start.is_resuming:
        raise UserError(
            f"load_path {run.start.source} is at batch {resumed} already, and the run has {data.steps}: nothing would be "
            "trained; raise max_duration, or set load_weights_only=true to start at batch 0"
        )
    if data.evaluators and (built.preemption.validation_due or is_done or (config.eval_first and resumed == 0)):
        trainer.eval()
    built.preemption.validation_due = False
    if not is_done:
        trainer.fit()
    trainer.close()
    built.recorder.finish(trainer.state, steps=data.steps)


def _end_early(run: Run, built: Built | None, record: RunRecord | None, error: BaseException) -> UserError | None:
    """Ends an unfinished run in good order. Returns the line that says what ``error`` means, if a user can do something about
    it."""
    settle_workers(error)
    microbatch: int | float | str = "auto"
    if built is not None:
        microbatch = built.trainer.state.device_train_microbatch_size or "auto"
    newest = built.saver.newest if built is not None else run.start.source or None
    stalled = built is not None and built.worker_watch.fired
    fault = explain(error, microbatch, newest, stalled=stalled)
    if record is not None:
        statuses = {KeyboardInterrupt: "interrupted", Preempted: "preempted"}
        status = statuses.get(type(error), "failed")
        cause = None if status != "failed" else f"{type(fault or error).__name__}: {fault or error}"
        try:
            record.update(status=status, error=cause)
        except OSError as problem:  # a full disk: this must not hide what ended the run
            log.error("%s can't be written: %s", record.path, problem.strerror)
    if built is not None:
        built.trainer.engine.close()
    if built is not None and built.uploads is not None and not isinstance(error, TakenOver):
        try:
            built.uploads.finish()
        except UserError as problem:  # after what ended the run, which is reported first
            print(f"warning: {problem}", file=sys.stderr, flush=True)
    return fault
