"""The order of samples: a pure function of the position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.data.order import counts, interleave, walk

weights = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8)


def shares_of(values: list[float]) -> np.ndarray:
    return np.array(values) / np.sum(values)


@given(weights, st.integers(0, 500), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_window_is_that_part_of_the_whole(values: list[float], start: int, size: int) -> None:
    whole = interleave(shares_of(values), 0, start + size)
    window = interleave(shares_of(values), start, start + size)
    assert np.array_equal(window[0], whole[0][start:])
    assert np.array_equal(window[1], whole[1][start:])


@given(weights, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_order_and_near_the_shares(values: list[float], total: int) -> None:
    shares = shares_of(values)
    domain, ordinal = interleave(shares, 0, total)
    assert np.array_equal(counts(shares, total), np.bincount(domain, minlength=len(shares)))
    assert np.abs(counts(shares, total) - shares * total).max() <= len(shares) / 2 + 1
    for index in range(len(shares)):
        assert np.array_equal(ordinal[domain == index], np.arange((domain == index).sum()))


def test_far_positions_are_exact() -> None:
    shares = shares_of([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02])
    first = 13_000_000_000
    domain, ordinal = interleave(shares, first, first + 1000)
    assert len(domain) == 1000
    before, after = counts(shares, first), counts(shares, first + 1000)
    for index in range(7):
        assert np.array_equal(ordinal[domain == index], np.arange(before[index], after[index]))


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_lap_of_a_walk_sees_every_sample_once(shuffle: bool) -> None:
    shards = np.array([5, 1, 8, 3, 8])
    options = {"name": "cc", "seed": 3, "block_size": 6, "shuffle": shuffle}
    whole = walk(shards, 0, 75, **options)
    laps = whole.reshape(3, 25)
    assert all(np.array_equal(np.sort(lap), np.arange(25)) for lap in laps)
    assert np.array_equal(laps[0], laps[1]) is not shuffle
    for start in range(0, 70, 7):
        for stop in (start, start + 1, start + 31):
            assert np.array_equal(walk(shards, start, stop, **options), np.resize(whole, 75)[start:stop]) or stop > 75


def test_a_walk_depends_on_seed_and_name() -> None:
    shards = np.full(4, 10)
    base = walk(shards, 0, 40, name="cc", seed=3, block_size=100, shuffle=True)
    assert not np.array_equal(base, walk(shards, 0, 40, name="cc", seed=4, block_size=100, shuffle=True))
    assert not np.array_equal(base, walk(shards, 0, 40, name="wiki", seed=3, block_size=100, shuffle=True))


def test_blocks_bound_the_shards_in_use() -> None:
    shards = np.full(20, 10)
    order = walk(shards, 0, 200, name="cc", seed=0, block_size=20, shuffle=True)
    for block in order.reshape(10, 20):
        assert len(set(block // 10)) == 2
