"""Rules that span keys, checked before anything is built."""

from __future__ import annotations

import math
import re

from mohd_train.config.plan import make_plan
from mohd_train.config.schema import Config
from mohd_train.errors import UserError

DURATION = re.compile(r"^(\d+(?:\.\d+)?)(ba|ep|tok|sp|dur)$")
CHOICES = {
    "device": ("auto", "cpu", "gpu"),
    "precision": ("amp_bf16", "amp_fp16", "fp32"),
    "kernels": ("auto", "reference", "grouped", "triton"),
    "optimizer.name": ("decoupled_adamw", "adamw"),
    "scheduler.name": ("cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup"),
    "nonfinite_loss": ("stop", "skip"),
    "router_collapse": ("warn", "stop", "ignore"),
    "python_log_level": ("debug", "info", "warning", "error"),
}
# Durations, and the units each may be given in.
DURATIONS = {
    "max_duration": ("ba", "ep", "tok", "sp"),
    "eval_interval": ("ba", "ep", "tok", "sp", "dur"),
    "save_interval": ("ba", "ep", "tok", "sp", "dur"),
    "scheduler.t_warmup": ("ba", "ep", "tok", "sp", "dur"),
    "routing_log_interval": ("ba",),
    "router_collapse_time": ("ba",),
    "save_keep_every": ("ba",),
    "console_log_interval": ("ba", "ep"),
}


def _get(config: Config, dotted: str) -> object:
    value: object = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_duration(key: str, value: object, units: tuple[str, ...]) -> None:
    match = DURATION.match(str(value))
    if not match or match[2] not in units:
        examples = " or ".join(f'"100{unit}"' for unit in units if unit != "dur")
        raise UserError(f"{key} is {value!r}; it must be a number with a unit, such as {examples}")
    if float(match[1]) == 0 and key != "scheduler.t_warmup":
        raise UserError(f"{key} is {value!r}; it must be more than 0")
    if "." in match[1] and match[2] != "dur":
        raise UserError(f"{key} is {value!r}; only the unit 'dur' (a share of the run) takes a fraction")


def _check_numbers(config: Config) -> None:
    for key in ("global_train_batch_size", "device_eval_batch_size"):
        if _get(config, key) < 1:  # type: ignore[operator]
            raise UserError(f"{key} is {_get(config, key)}; it must be at least 1")
    micro = config.device_train_microbatch_size
    if micro != "auto" and (not isinstance(micro, int) or micro < 1):
        raise UserError(f"device_train_microbatch_size is {micro!r}; it must be 'auto' or at least 1")
    for key in ("optimizer.lr", "optimizer.router_lr", "optimizer.eps"):
        value = _get(config, key)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise UserError(f"{key} is {value}; it must be a positive number")
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise UserError(f"optimizer.betas is {config.optimizer.betas}; it must be two numbers in [0, 1)")
    if config.optimizer.weight_decay < 0:
        raise UserError(f"optimizer.weight_decay is {config.optimizer.weight_decay}; it must be 0 or more")
    if not 0 <= config.scheduler.alpha_f <= 1:
        raise UserError(f"scheduler.alpha_f is {config.scheduler.alpha_f}; it must lie in 0 .. 1")
    if config.gradient_clipping is not None and config.gradient_clipping <= 0:
        raise UserError(f"gradient_clipping is {config.gradient_clipping}; it must be positive, or null for none")
    if config.loss_spike_factor is not None and not config.loss_spike_factor > 1:
        raise UserError(f"loss_spike_factor is {config.loss_spike_factor}; it must be more than 1, or null for off")
    if not 0 < config.router_collapse_share <= 1:
        raise UserError(f"router_collapse_share is {config.router_collapse_share}; it must lie in 0 .. 1")
    if not config.start_timeout > 0:
        raise UserError(f"start_timeout is {config.start_timeout}; it must be more than 0 seconds")
    _check_data(config)
    if config.data.worker_timeout < 0:
        raise UserError(f"data.worker_timeout is {config.data.worker_timeout}; it must be 0 (for ever) or more seconds")
    keep = config.save_num_checkpoints_to_keep
    if keep < -1 or (keep == 0 and "://" not in config.save_folder):
        raise UserError(f"save_num_checkpoints_to_keep is {keep}; it must be -1 (all) or at least 1")
    if config.data.num_workers < 0:
        raise UserError(f"data.num_workers is {config.data.num_workers}; it must be 0 or more")


def _check_data(config: Config) -> None:
    data = config.data
    for key, least in (
        ("shuffle_block_size", 1),
        ("num_canonical_nodes", 1),
        ("predownload", 0),
        ("download_retry", 0),
    ):
        value = getattr(data, key)
        if value is not None and value < least:
            raise UserError(f"data.{key} is {value}; it must be at least {least}")
    if not 0 < data.download_timeout < math.inf:
        raise UserError(f"data.download_timeout is {data.download_timeout}; it must be a positive number of seconds")
    if not math.isfinite(data.worker_timeout):
        raise UserError(
            f"data.worker_timeout is {data.worker_timeout}; it must be a number of seconds, 0 to wait forever"
        )


def _check_domains(config: Config) -> None:
    domains = config.data.domains
    if not domains:
        raise UserError("data.domains is empty; name the domains and their proportions, such as {cc: 0.67, wiki: 0.33}")
    for name, share in domains.items():
        if not math.isfinite(share) or share <= 0:
            raise UserError(
                f"data.domains.{name} is {share}; a proportion must be positive (leave the domain out for none)"
            )
    unknown = [name for name in config.data.optional_domains if name not in domains]
    if unknown:
        raise UserError(f"data.optional_domains names {', '.join(unknown)}, which data.domains does not have")


def check(config: Config) -> None:
    """Raises :class:`UserError` for the first rule that ``config`` breaks."""
    for key, known in CHOICES.items():
        if _get(config, key) not in known:
            raise UserError(f"{key} is {_get(config, key)!r}; it must be one of {', '.join(known)}")
    for key, units in DURATIONS.items():
        if _get(config, key) is not None:
            _check_duration(key, _get(config, key), units)
    _check_numbers(config)
    _check_domains(config)
    make_plan(config.model, config.mohd, config.max_seq_len)
