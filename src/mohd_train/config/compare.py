"""Whether two configs describe the same run: they must agree in what it computes, not in where and how it runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from omegaconf import MISSING

from mohd_train.config.plan import current_name
from mohd_train.config.schema import Config

# Keys that may change between the sessions of one run: they decide where and how it runs, not what it computes.
FREE_KEYS = (
    "autoresume", "save_overwrite", "save_interval", "save_num_checkpoints_to_keep", "save_folder", "run_folder", "progress_bar",
    "console_log_interval", "python_log_level", "routing_log_interval", "dist_timeout", "loggers", "callbacks", "fsdp_config",
    "eval_interval", "eval_first", "eval_subset_num_batches", "device_eval_batch_size", "data.local", "data.remote",
    "data.num_workers", "data.predownload", "data.download_retry", "data.download_timeout", "data.verify", "data.optional_domains",
    "data.worker_timeout", "save_keep_every", "nonfinite_loss", "loss_spike_factor", "router_collapse", "router_collapse_share",
    "router_collapse_time", "start_timeout", "device_train_microbatch_size",
)  # fmt: skip


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, child in value.items():
        name = f"{prefix}{key}"
        if isinstance(child, dict) and name not in FREE_KEYS:
            flat |= _flatten(child, f"{name}.")
        elif name not in FREE_KEYS:
            flat[name] = child
    return flat


DEFAULTS = {key: value for key, value in _flatten(dataclasses.asdict(Config())).items() if value != MISSING}


def _settled(value: dict[str, Any]) -> dict[str, Any]:
    """The flat config, with renamed values under today's names. JSON makes a tuple and a list the same.

    A key that an earlier version didn't have gets its default, which is what that version did.
    """
    flat = _flatten(json.loads(json.dumps(value)))
    return DEFAULTS | {key: current_name(key, child) for key, child in flat.items()}


def config_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """``["optimizer.lr: 0.001 there, 0.0003 here", ...]`` over the keys that decide what a run computes."""
    a, b = _settled(there), _settled(here)
    return [
        f"{key}: {a.get(key)} there, {b.get(key)} here"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
