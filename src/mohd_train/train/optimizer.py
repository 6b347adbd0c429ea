"""Optimizer with three parameter groups, and the schedule that scales all of them."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Time, TimeUnit
from composer.optim import (
    ComposerScheduler,
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    DecoupledAdamW,
    LinearScheduler,
    LinearWithWarmupScheduler,
)
from torch import nn

from mohd_train.config.schema import OptimizerConfig, SchedulerConfig
from mohd_train.errors import UserError

ROUTER = "router.centroids"
# Decay pulls towards zero: wrong for a norm's gain (neutral at 1), group fusion (neutral at the identity), and for
# embedding rows, of which a batch touches few.
NOT_DECAYED = ("norm.weight", "embedding.weight", ".fusion.")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups ``decay`` (linear weights, head), ``no_decay`` (norms, embedding, group fusion), ``router`` (centroids,
    own lr).

    Groups without a parameter are left out, so that a dense model has two. Every parameter is in exactly one.
    """
    router_lr = config.lr if config.router_lr is None else config.router_lr
    groups: dict[str, dict[str, Any]] = {
        "decay": {"lr": config.lr, "weight_decay": config.weight_decay},
        "no_decay": {"lr": config.lr, "weight_decay": 0.0},
        "router": {"lr": router_lr, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for name, parameter in model.named_parameters():
        if name.endswith(ROUTER):
            kind = "router"
        elif any(mark in name for mark in NOT_DECAYED):
            kind = "no_decay"
        else:
            kind = "decay"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """``decoupled_adamw``: Composer's, whose decay follows the schedule and not the lr; ``adamw``: torch's."""
    beta1, beta2 = config.betas
    known: dict[str, Any] = {"decoupled_adamw": DecoupledAdamW, "adamw": torch.optim.AdamW}
    groups = parameter_groups(model, config)
    optimizer: torch.optim.Optimizer = known[config.name](
        groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay
    )
    return optimizer


def _schedule_unit(time: Time, max_duration: Time) -> TimeUnit:
    """The unit in which Composer compares ``time``: epochs count in batches, shares in the unit of ``max_duration``."""
    unit = max_duration.unit if time.unit == TimeUnit.DURATION else time.unit
    return TimeUnit.BATCH if unit == TimeUnit.EPOCH else unit


def build_scheduler(config: SchedulerConfig, max_duration: str) -> ComposerScheduler:
    """Linear warm-up from 0, then the named decay to ``alpha_f`` of the peak at the end of the run.

    Raises:
        UserError: a warm-up in a unit that can't be compared with the run's length.
    """
    warmup, end = Time.from_timestring(config.t_warmup), Time.from_timestring(max_duration)
    if _schedule_unit(warmup, end) != _schedule_unit(end, end):
        raise UserError(
            f"scheduler.t_warmup is {config.t_warmup!r} while max_duration is {max_duration!r}; give both in one unit, "
            f'or the warm-up as a share of the run, such as "0.03dur"'
        )
    if warmup.value == 0:  # Composer warns of an empty warm-up
        plain: dict[str, ComposerScheduler] = {
            "cosine_with_warmup": CosineAnnealingScheduler(alpha_f=config.alpha_f),
            "linear_decay_with_warmup": LinearScheduler(alpha_i=1.0, alpha_f=config.alpha_f),
            "constant_with_warmup": ConstantScheduler(alpha=1.0),
        }
        return plain[config.name]
    known: dict[str, ComposerScheduler] = {
        "cosine_with_warmup": CosineAnnealingWithWarmupScheduler(t_warmup=config.t_warmup, alpha_f=config.alpha_f),
        "linear_decay_with_warmup": LinearWithWarmupScheduler(t_warmup=config.t_warmup, alpha_f=config.alpha_f),
        "constant_with_warmup": ConstantWithWarmupScheduler(t_warmup=config.t_warmup),
    }
    return known[config.name]
