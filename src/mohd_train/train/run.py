"""A run from its config to its end: what ``scripts/train.py`` calls."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.record import RunRecord
from mohd_train.train import parallel, registry
from mohd_train.train.build import Built, build_model, build_trainer, share_run_id, start
from mohd_train.train.callbacks import FirstBatchWatchdog
from mohd_train.train.callbacks.uploads import TakenOver, complete
from mohd_train.train.data import TrainData, build_data, on_rank_zero
from mohd_train.train.faults import explain, settle_workers
from mohd_train.train.optimizer import build_optimizer
from mohd_train.train.preemption import Preempted, StopSignal, stop_signal
from mohd_train.train.prepare import Run, prepare
from mohd_train.utils.text import short

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Prints on rank 0."""
    if parallel.is_rank_zero():
        print(text, flush=True)


def summary(run: Run, data: TrainData) -> str:
    """What will be trained, on what, for how long, and where it is written."""
    config, plan, counts = run.config, run.plan, run.counts
    batch, tokens = config.global_train_batch_size, data.steps * config.global_train_batch_size * config.max_seq_len
    parts = {
        name: f"N {part.sub_dims}, K {part.top_k}, S {part.shared}" if part else "dense"
        for name, part in (("attention", plan.attention), ("ffn", plan.ffn))
    }
    extras = [f"{name} {short(size)}" for name, size in (("router", counts.router), ("fusion", counts.fusion)) if size]
    lines = {
        "run": f"{config.run_name} · seed {config.seed} · {parallel.world_size()} × {run.device} · {config.precision}",
        "model": f"{plan.name} · {short(counts.activated)} activated, {short(counts.total)} total parameters"
        + (f" (beside them {', '.join(extras)})" if extras else "")
        + f" · hidden {plan.hidden_size} · layers {plan.num_hidden_layers}",
        "": f"attention {parts['attention']} · ffn {parts['ffn']}"
        + f" · kernels {parallel.resolve_kernels(config, plan, run.device)} (kernels: {config.kernels})"
        if plan.components
        else "dense (LLaMA)",
        "length": f"{data.steps} batches × {batch} samples × {config.max_seq_len} tokens = {short(tokens)} tokens · "
        f"microbatch {parallel.microbatch_size(config, run.device)}",
        "optimizer": f"{config.optimizer.name} · lr {config.optimizer.lr:g} (router {config.optimizer.router_lr:g}) · "
        f"{config.scheduler.name}, warm-up {config.scheduler.t_warmup}, to {config.scheduler.alpha_f:.0%}",
        "writes": f"{run.folder}/ (run.json, metrics.jsonl, logs/) · every {config.save_interval} {config.save_folder}/",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items()) + f"\n\n{data.mix.render()}\n"


def dry_run(config: Config) -> None:
    """Every check, and the parts that can be built without writing: data, model, optimizer. Raises UserError as a run would."""
    run = prepare(config)
    run.release()
    data = build_data(config, run.manifest)
    build_optimizer(build_model(run), config.optimizer)
    say(summary(run, data))
    say("dry run: all checks passed; nothing was written")


def train(config: Config) -> None:
    """Trains ``config`` to its end, or goes on with it where autoresume finds a checkpoint.

    ``run.json`` says how it ended: ``finished``, ``preempted`` (SIGTERM: saved, and returns), ``interrupted`` (Ctrl-C) or
    ``failed``; a killed run stays ``running``.

    Raises:
        UserError: bad input; nothing has been written then, save for what only the first load can find. Or a fault while running
            that the user can do something about.
    """
    watchdog = FirstBatchWatchdog(Path(config.run_folder), config.start_timeout)
    watchdog.start()
    run = None
    try:
        with stop_signal() as stop:
            try:
                run = prepare(config)
                _train(run, stop, watchdog)
            except Preempted:
                say(f"stopped by SIGTERM: {config.run_folder} goes on with autoresume=true")
    finally:
        watchdog.cancel()
        if run is not None:
            run.release()


def _train(run: Run, stop: StopSignal, watchdog: FirstBatchWatchdog) -> None:
    config = run.config
    if run.finished:
        say(f"{run.folder}: this run is already finished; nothing to do (set another run_name for a new one)")
        on_rank_zero(lambda: complete(run.config, run.brought))
        return
    if "wandb" in registry.check_loggers(config.loggers) and registry.wandb_is_offline():
        say(f"W&B records offline (no API key): upload later with `wandb sync {run.folder}/wandb/offline-run-*`")
    record = start(run)
    built = None
    try:
        data = build_data(config, run.manifest)
        say(summary(run, data))
        built = build_trainer(run, data, record, share_run_id(record), stop)
        run.brought.clear()
        built.trainer.state.callbacks.append(watchdog)
        _fit(run, data, built)
    except BaseException as error:
        fault = _close(run, built, record, error)
        if fault is not None:
            raise fault from error
        raise
    if built.uploads is not None:
        built.uploads.finish()
    say(f"finished: {run.folder}/run.json · {built.saver.newest or 'no new checkpoint'}")


def _fit(run: Run, data: TrainData, built: Built) -> None:
    config, trainer = run.config, built.trainer
    resumed = trainer.state.timestamp.batch.value
    for line in run.skipped:
        say(f"skipped a broken checkpoint: {line}")
    if run.source:
        say(f"goes on from {run.source}, batch {resumed}")
    ended = resumed >= data.steps
    if data.evaluators and (built.preemption.validation_due or ended or (config.eval_first and resumed == 0)):
        trainer.eval()
    built.preemption.validation_due = False
    if not ended:
        trainer.fit()
    trainer.close()
    built.recorder.finish(trainer.state)


def _close(run: Run, built: Built | None, record: RunRecord | None, error: BaseException) -> UserError | None:
    """Leaves an unfinished run in order, and says what ``error`` means, where a user can do something about it."""
    settle_workers(error)
    microbatch: int | float | str = "auto"
    if built is not None:
        microbatch = built.trainer.state.device_train_microbatch_size or "auto"
    newest = built.saver.newest if built is not None else run.source or None
    stalled = built is not None and built.worker_watch.fired
    fault = explain(error, microbatch, newest, stalled=stalled)
    if record is not None:
        statuses = {KeyboardInterrupt: "interrupted", Preempted: "preempted"}
        status = statuses.get(type(error), "failed")
        cause = None if status != "failed" else f"{type(fault or error).__name__}: {fault or error}"
        try:
            record.update(status=status, error=cause)
        except OSError as problem:  # a full disk: what ended the run must not be hidden by this
            log.error("%s can't be written: %s", record.path, problem.strerror)
    if built is not None:
        built.trainer.engine.close()
    if built is not None and built.uploads is not None and not isinstance(error, TakenOver):
        try:
            built.uploads.finish()
        except UserError as problem:  # beside what ended the run, which is told first
            print(f"warning: {problem}", file=sys.stderr, flush=True)
    return fault
