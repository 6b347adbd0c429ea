"""The range of every number in a config. A number outside it would fail, hang or train on nothing, and only much later.

The bounds exclude what makes no sense, not what is unwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mohd_train.config.keys import NUMERIC_KEYS, items, value_of
from mohd_train.errors import UserError

YEAR = 365 * 24 * 3600.0  # seconds
SEED = 2**32 - 1  # NumPy's largest
COUNT = 2**31 - 1  # samples, tokens, indices that become an int32 somewhere


@dataclass(frozen=True)
class Bounds:
    """``low .. high``, both included unless ``open`` names the end that is not.

    Attributes:
        open: ``low`` or ``high``, the end that is excluded.
        other: values outside the range that are allowed too.
        rule: the rule in words, if the range alone doesn't express it.
    """

    low: float
    high: float
    open: str = ""
    other: tuple[object, ...] = ()
    rule: str = ""

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is within the bounds; NaN never is."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high:
            return not (self.open == "low" and value == self.low) and not (self.open == "high" and value == self.high)
        return value in self.other

    def __str__(self) -> str:
        if self.rule:
            return self.rule
        first, last = f"{self.low:.15g}", f"{self.high:.15g}"
        ranges = {
            "": f"it must be at least {first} and at most {last}",
            "low": f"it must be more than {first} and at most {last}",
            "high": f"it must be at least {first} and less than {last}",
        }
        return ranges[self.open] + "".join(f", or be {value}" for value in self.other)


_SECONDS = Bounds(0, YEAR, open="low", rule=f"it must be a positive number of seconds, at most {YEAR:.0f} (a year)")
_RATE = Bounds(0, 10, open="low", rule="it must be a positive number, at most 10")
_SIZE = Bounds(1, 2**20)

BOUNDS = {
    "model.hidden_size": _SIZE,
    "model.intermediate_size": _SIZE,
    "model.num_hidden_layers": Bounds(1, 2**12),
    "model.num_attention_heads": Bounds(1, 2**12),
    "model.num_key_value_heads": Bounds(1, 2**12),
    "model.head_dim": Bounds(1, 2**12),
    "model.vocab_size": Bounds(1, 2**24),
    "model.rope_theta": Bounds(0, 1e12, open="low"),
    "model.rms_norm_eps": Bounds(0, 1, open="low"),
    "model.initializer_range": Bounds(0, 100, open="low"),
    "mohd.expansion": Bounds(1, 64, rule="it must be 1 (compression) or more (expansion), at most 64"),
    "mohd.attention.sub_dims": _SIZE,
    "mohd.attention.top_k": _SIZE,
    "mohd.attention.shared_sub_dims": Bounds(0, 2**20),
    "mohd.ffn.sub_dims": _SIZE,
    "mohd.ffn.top_k": _SIZE,
    "mohd.ffn.shared_sub_dims": Bounds(0, 2**20),
    "mohd.experts.num_experts": _SIZE,
    "mohd.experts.top_k": _SIZE,
    "mohd.experts.shared_experts": Bounds(0, 2**20),
    "mohd.router_init_std": Bounds(
        0,
        1000,
        rule="it must be 0 or positive, or null for a router that is drawn like any other matrix (at most 1000)",
    ),
    "mohd.balance_loss_weight": Bounds(0, 1e6, rule="it must be 0 (off) or positive, at most 1e6"),
    "data.domains": Bounds(
        0, 1e12, open="low", rule="a proportion must be positive, at most 1e12 (leave the domain out for none)"
    ),
    "data.shuffle_seed": Bounds(0, SEED),
    "data.shuffle_block_size": Bounds(1, 2**40),
    "data.num_canonical_nodes": Bounds(1, 2**16),
    "data.predownload": Bounds(0, COUNT),
    "data.num_workers": Bounds(0, 1024),
    "data.download_retry": Bounds(0, 1000),
    "data.download_timeout": _SECONDS,
    "data.worker_timeout": Bounds(
        0, YEAR, rule=f"it must be a number of seconds, 0 to wait forever, at most {YEAR:.0f} (a year)"
    ),
    "optimizer.lr": _RATE,
    "optimizer.router_lr": _RATE,
    "optimizer.betas": Bounds(0, 1, open="high", rule="it must be two numbers in [0, 1)"),
    "optimizer.eps": Bounds(0, 1, open="low", rule="it must be a positive number, at most 1"),
    "optimizer.weight_decay": Bounds(0, 10),
    "scheduler.alpha_f": Bounds(0, 1),
    "seed": Bounds(0, SEED),
    "max_seq_len": Bounds(1, 2**24),
    "global_train_batch_size": Bounds(1, COUNT, rule=f"it must be at least 1, and at most {COUNT}"),
    "device_train_microbatch_size": Bounds(
        1, COUNT, other=("auto",), rule=f"it must be 'auto' or at least 1, and at most {COUNT}"
    ),
    "device_eval_batch_size": Bounds(1, COUNT, rule=f"it must be at least 1, and at most {COUNT}"),
    "eval_subset_num_batches": Bounds(1, COUNT, other=(-1,), rule=f"it must be -1 (all) or lie in 1 .. {COUNT}"),
    "gradient_clipping": Bounds(0, 1e12, open="low", rule="it must be positive, at most 1e12, or null for none"),
    "dist_timeout": _SECONDS,
    "save_num_checkpoints_to_keep": Bounds(0, COUNT, other=(-1,), rule=f"it must be -1 (all) or lie in 1 .. {COUNT}"),
    "loss_spike_factor": Bounds(1, 1e12, open="low", rule="it must be more than 1, at most 1e12, or null for off"),
    "router_collapse_share": Bounds(0, 1, open="low"),
    "start_timeout": _SECONDS,
}


def check_number(key: str, value: Any, name: str = "") -> None:
    """Raises :class:`UserError` if ``value`` is out of the bounds of ``key``, calling it ``name`` (by default the key)."""
    if not BOUNDS[key].holds(value):
        shown = f"{value:.6g}" if isinstance(value, float) and 1e16 < abs(value) < math.inf else f"{value!r}"
        raise UserError(f"{name or key} is {shown}; {BOUNDS[key]}")


def check_numbers(config: Any, section: str = "") -> None:
    """Raises :class:`UserError` for the first number of ``config`` that is out of its bounds; null is always within.

    Args:
        config: a :class:`~mohd_train.config.schema.Config`, or one section of it.
        section: the section's key, such as ``model``; empty for a complete config.
    """
    prefix = f"{section}." if section else ""
    for key in NUMERIC_KEYS:
        if key.startswith(prefix):
            for name, value in items(key, value_of(config, key[len(prefix) :])):
                check_number(key, value, name)
