"""A readable summary of what a run is about to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mohd_train.train import parallel
from mohd_train.train.data import TrainData
from mohd_train.utils.text import short

if TYPE_CHECKING:
    from mohd_train.train.train import Run


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
        for name, part in (("attention", plan.attention), ("ffn", plan.ffn or plan.experts))
    }
    if plan.experts is not None:
        parts["ffn"] += " (experts)"
    extras = [f"{name} {short(size)}" for name, size in (("router", counts.router), ("fusion", counts.fusion)) if size]
    lines = {
        "run": f"{config.run_name} · seed {config.seed} · {parallel.world_size()} × {run.device} · {config.precision}",
        "model": f"{plan.name} · {short(counts.activated)} activated, {short(counts.total)} total parameters"
        + (f" (not counted: {', '.join(extras)})" if extras else "")
        + f" · hidden {plan.hidden_size} · layers {plan.num_hidden_layers}",
        "": f"attention {parts['attention']} · ffn {parts['ffn']}"
        + f" · kernels {parallel.resolve_kernels(config, plan, run.device)} (kernels: {config.kernels})"
        if plan.routed
        else "dense (LLaMA)",
        "length": f"{data.steps} batches × {batch} samples × {config.max_seq_len} tokens = {short(tokens)} tokens · "
        f"microbatch {parallel.microbatch_size(config, run.device)}",
        "optimizer": f"{config.optimizer.name} · lr {config.optimizer.lr:g} (router {config.optimizer.router_lr:g}) · "
        f"{config.scheduler.name}, warm-up {config.scheduler.t_warmup}, to {config.scheduler.alpha_f:.0%}",
        "writes": f"{run.folder}/ (run.json, metrics.jsonl, logs/) · every {config.save_interval} {config.save_folder}/",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items()) + f"\n\n{data.mix.render()}\n"
