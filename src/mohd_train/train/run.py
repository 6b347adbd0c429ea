"""A run from its config to its end: what ``scripts/train.py`` calls."""

from __future__ import annotations

from mohd_train.config.schema import Config
from mohd_train.train import parallel, registry
from mohd_train.train.build import Run, build_model, build_trainer, prepare, share_run_id, start
from mohd_train.train.callbacks.progress import short
from mohd_train.train.data import TrainData, build_data
from mohd_train.train.optimizer import build_optimizer


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
        "": f"attention {parts['attention']} · ffn {parts['ffn']}" if plan.components else "dense (LLaMA)",
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
    data = build_data(config, run.manifest)
    build_optimizer(build_model(run), config.optimizer)
    say(summary(run, data))
    say("dry run: all checks passed; nothing was written")


def train(config: Config) -> None:
    """Trains ``config`` to its end, or goes on with it where autoresume finds a checkpoint.

    ``run.json`` says how it ended: ``finished``, ``interrupted`` (Ctrl-C) or ``failed``; a killed run stays ``running``.

    Raises:
        UserError: bad input; nothing has been written then, save for what only the first load can find.
    """
    run = prepare(config)
    if run.finished:
        say(f"{run.folder}: this run is already finished; nothing to do (set another run_name for a new one)")
        return
    if "wandb" in registry.check_loggers(config.loggers) and registry.wandb_is_offline():
        say(f"W&B records offline (no API key): upload later with `wandb sync {run.folder}/wandb/offline-run-*`")
    record = start(run)
    try:
        data = build_data(config, run.manifest)
        say(summary(run, data))
        trainer, recorder = build_trainer(run, data, record, share_run_id(record))
    except BaseException as error:
        if record is not None:
            record.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    resumed = trainer.state.timestamp.batch.value
    for line in run.skipped:
        say(f"skipped a broken checkpoint: {line}")
    if run.resumes or config.load_path:
        say(f"goes on from {run.resumes or config.load_path}, batch {resumed}")
    try:
        if config.eval_first and resumed == 0 and data.evaluators:
            trainer.eval()
        trainer.fit()
        trainer.close()
        recorder.finish(trainer.state)
    except BaseException as error:
        if record is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            record.update(
                status="interrupted" if stopped else "failed",
                error=None if stopped else f"{type(error).__name__}: {error}",
            )
        trainer.engine.close()
        raise
    checkpoints = recorder.saver.saved_checkpoints
    say(f"finished: {run.folder}/run.json · {checkpoints[-1] if checkpoints else 'no new checkpoint'}")
