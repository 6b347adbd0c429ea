"""Every number of a config has bounds, and within them a config builds a plan."""

from __future__ import annotations

import copy
import functools
import math
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.config.bounds import BOUNDS
from mohd_train.config.check import DURATIONS, check
from mohd_train.config.keys import KNOWN_KEYS, NUMERIC_KEYS, is_number, item_type, items, options, value_of
from mohd_train.config.load import load_config, load_model_plan
from mohd_train.config.plan import make_plan
from mohd_train.config.schema import Config
from mohd_train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WHOLE = ("data.local=x", "data.domains={a: 1, b: 2}", "max_duration=10ba", "global_train_batch_size=8")
WHOLE_NUMBERS = [-(2**63), -2, -1, 0, 1, 2, *(2**n + d for n in (16, 20, 24, 31, 32, 53, 63, 64) for d in (-1, 0, 1))]
FLOATS = [math.nan, math.inf, -math.inf, -0.0, 1e-45, 0.5, 1.5, 1e38, 1e308, *map(float, WHOLE_NUMBERS)]


def test_every_number_of_the_schema_has_bounds() -> None:
    assert set(BOUNDS) == set(NUMERIC_KEYS)
    assert {key for key in KNOWN_KEYS if is_number(KNOWN_KEYS[key])} == set(NUMERIC_KEYS)
    assert len(NUMERIC_KEYS) > 40


@pytest.mark.parametrize("key", NUMERIC_KEYS)
def test_bounds_are_finite_and_hold_the_default(key: str) -> None:
    bounds = BOUNDS[key]
    assert math.isfinite(bounds.low)
    assert math.isfinite(bounds.high)
    for value in (math.nan, math.inf, -math.inf, 10**400, True):
        assert not bounds.holds(value)
    for _, value in items(key, value_of(Config(), key)):
        assert value == "???" or bounds.holds(value)


@functools.cache
def base(mohd: str = "mohd/x2") -> Config:
    return load_config([str(ROOT / "configs/model/tiny.yaml"), str(ROOT / f"configs/{mohd}.yaml")], [*WHOLE])


def with_value(key: str, value: float) -> Config:
    """The config with the key, or its first entry, set to ``value``, which OmegaConf has typed."""
    config = copy.deepcopy(base("moe/moe-x2" if key.startswith("mohd.experts.") else "mohd/x2"))
    *sections, last = key.split(".")
    section = functools.reduce(getattr, sections, config)
    kind = typing.get_origin(options(KNOWN_KEYS[key])[0])
    setattr(section, last, [value, 0.5] if kind is list else {"a": value, "b": 1.0} if kind is dict else value)
    return config


def refused_by_a_line_or_builds_a_plan(key: str, value: float) -> None:
    config = with_value(key, value)
    line = ""
    try:
        check(config)
    except UserError as error:
        line = str(error)
    if line:
        assert "\n" not in line
        assert key in line
        return
    assert math.isfinite(value)
    assert BOUNDS[key].low <= value <= BOUNDS[key].high or value in BOUNDS[key].other
    assert make_plan(config.model, config.mohd, config.max_seq_len)


def is_float(key: str) -> bool:
    annotation = KNOWN_KEYS[key]
    return float in options(item_type(annotation) or annotation)


@pytest.mark.parametrize("key", NUMERIC_KEYS)
def test_edge_values_are_refused_by_one_line_or_build_a_plan(key: str) -> None:
    for value in FLOATS if is_float(key) else WHOLE_NUMBERS:
        refused_by_a_line_or_builds_a_plan(key, value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_number_is_refused_by_one_line_or_builds_a_plan(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(NUMERIC_KEYS))
    refused_by_a_line_or_builds_a_plan(key, data.draw(st.floats() if is_float(key) else st.integers(-(2**70), 2**70)))


@pytest.mark.parametrize("value", [".nan", str(2**64)])
def test_a_number_that_was_typed_is_refused_under_its_name(value: str, files: list[str]) -> None:
    """Through YAML and OmegaConf; no key takes these."""
    for key in NUMERIC_KEYS:
        kind = typing.get_origin(options(KNOWN_KEYS[key])[0])
        word = {list: f"{key}=[{value}, 0.5]", dict: f"{key}={{cc: {value}}}"}.get(kind, f"{key}={value}")
        moe = [str(ROOT / "configs/moe/moe-x2.yaml")] if key.startswith("mohd.experts.") else []
        with pytest.raises(UserError, match=re.escape(key)) as caught:
            load_model_plan([*files[1:], *moe], [word]) if key.startswith(("model.", "mohd.")) else load_config(
                files, [word]
            )
        assert "\n" not in str(caught.value)


REFUSED = [
    ("seed=-1", "seed is -1; it must be at least 0 and at most 4294967295"),
    ("seed=4294967296", "seed is 4294967296; it must be at least 0 and at most 4294967295"),
    ("optimizer.weight_decay=.nan", "optimizer.weight_decay is nan; it must be at least 0 and at most 10"),
    ("gradient_clipping=.inf", "gradient_clipping is inf; it must be positive, at most 1e12, or null for none"),
    ("mohd.balance_loss_weight=.nan", "mohd.balance_loss_weight is nan; it must be 0 (off) or positive"),
    ("model.initializer_range=.inf", "model.initializer_range is inf; it must be more than 0 and at most 100"),
    ("optimizer.lr=1e38", "optimizer.lr is 1e+38; it must be a positive number, at most 10"),
    ("data.shuffle_block_size=-3", "data.shuffle_block_size is -3; it must be at least 1 and at most "),
    ("data.predownload=-1", "data.predownload is -1; it must be at least 0 and at most "),
    ("data.num_canonical_nodes=0", "data.num_canonical_nodes is 0; it must be at least 1 and at most 65536"),
    ("dist_timeout=-5", "dist_timeout is -5.0; it must be a positive number of seconds, at most 31536000 (a year)"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas is 1.0; it must be two numbers in [0, 1)"),
    ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; it must be two numbers in [0, 1)"),
    ("eval_subset_num_batches=0", "eval_subset_num_batches is 0; it must be -1 (all) or lie in 1 .. "),
    ("save_num_checkpoints_to_keep=0", "save_num_checkpoints_to_keep is 0; it must be -1 (all) or at least 1"),
    ("model.vocab_size=0", "model.vocab_size is 0; it must be at least 1 and at most "),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_a_number_out_of_bounds_is_named(override: str, message: str, files: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(files, [override])
    assert str(caught.value).startswith(f"override {override!r}: {message}")


def test_a_model_alone_is_checked_too(files: list[str]) -> None:
    with pytest.raises(UserError, match=r"model\.rope_theta is nan"):
        load_model_plan(files[1:], ["model.rope_theta=.nan"])


@pytest.mark.parametrize("key", sorted(DURATIONS))
@pytest.mark.parametrize("number", ["9" * 30, "٣", "1\n", "-1", "1e3", "nan"])
def test_durations_are_plain_numbers_that_counters_hold(key: str, number: str, files: list[str]) -> None:
    unit = DURATIONS[key][0]
    with pytest.raises(UserError, match=rf"{key} is"):
        load_config(files, [f'{key}="{number}{unit}"'.replace("\n", "\\n")])


@pytest.mark.parametrize(
    ("warmup", "whole", "accepted"),
    [
        ("10ba", "10ba", True),
        ("11ba", "10ba", False),
        ("11ba", "80sp", False),
        ("10ba", "80sp", True),
        ("81sp", "10ba", False),
        ("327681tok", "10ba", False),
        ("327680tok", "10ba", True),
        ("2ep", "1ep", False),
        ("100ba", "1ep", True),  # only the data says how long an epoch is
        ("1dur", "10ba", True),
        ("1.5dur", "10ba", False),
        ("0ba", "10ba", True),
    ],
)
def test_a_warmup_is_no_longer_than_the_run(warmup: str, whole: str, accepted: bool, files: list[str]) -> None:
    """Batches of 8 samples of 4096 tokens."""
    words = [f"scheduler.t_warmup={warmup}", f"max_duration={whole}"]
    if accepted:
        assert load_config(files, words).scheduler.t_warmup == warmup
    else:
        with pytest.raises(UserError, match=rf"scheduler.t_warmup is '{warmup}'.*(longer than|share of) the run"):
            load_config(files, words)
