"""The choice of validation documents."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.data.validation import Sorter, select, target


def documents(seed: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(5, 50, count), rng.integers(0, 1 << 63, count).astype(np.uint64)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 2000))
@settings(max_examples=50, deadline=None)
def test_the_choice_does_not_depend_on_units_or_order(seed: int, units: int, tokens: int) -> None:
    lengths, digests = documents(seed)
    whole = select([(lengths, digests)], tokens, int(lengths.sum()))
    order = np.random.default_rng(seed).permutation(len(lengths))
    parts = zip(np.array_split(lengths[order], units), np.array_split(digests[order], units), strict=True)
    assert np.array_equal(select(parts, tokens, int(lengths.sum())), whole)


def test_about_the_tokens_asked_for() -> None:
    lengths, digests = documents(0)
    chosen = select([(lengths, digests)], 1000, int(lengths.sum()))
    assert 1000 <= lengths[np.isin(digests, chosen)].sum() < 1050
    assert len(select([(lengths, digests)], 0, 1)) == 0


def test_copies_count_once() -> None:
    lengths, digests = np.full(10, 10), np.repeat(np.arange(5, dtype=np.uint64), 2)
    assert select([(lengths, digests)], 20, 100).tolist() == [0, 1]


def test_never_more_than_half() -> None:
    lengths, digests = np.array([10, 10, 10]), np.array([5, 6, 7], np.uint64)
    assert select([(lengths, digests)], 30, 30).tolist() == [5]
    assert select([(lengths[:1], digests[:1])], 30, 10).tolist() == []


def test_long_documents_are_passed_over_unless_there_are_no_others() -> None:
    lengths, digests = np.array([900, 10, 300]), np.array([1, 2, 3], np.uint64)
    assert select([(lengths, digests)], 10, 1210).tolist() == [2]
    assert select([(lengths[[0, 2]], digests[[0, 2]])], 10, 1200).tolist() == [3]


def test_targets() -> None:
    assert target(2_000_000, 0.045, 10**9, 4096).tokens == 90_000
    assert target(2_000_000, 0.001, 10**9, 4096).tokens == 4096  # at least a sample
    assert target(2_000_000, 0.67, 100_000, 4096) == (small := target(2_000_000, 0.67, 100_000, 4096))
    assert small.tokens == 10_000
    assert small.asked == 1_340_000
    assert target(2_000_000, 0.67, 6000, 4096).tokens == 3000
    assert target(0, 0.67, 6000, 4096).tokens == 0


def test_copies_of_validation_documents_go_nowhere() -> None:
    own, others = np.array([1], np.uint64), np.array([1, 9], np.uint64)
    sorter = Sorter(own, others)
    train, val = sorter.sort(np.array([1, 2, 9], np.uint64))
    assert train.tolist() == [False, True, False]
    assert val.tolist() == [True, False, False]
    train, val = sorter.sort(np.array([1, 3], np.uint64))
    assert train.tolist() == [False, True]
    assert val.tolist() == [False, False]
