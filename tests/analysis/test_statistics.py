"""Streamed statistics against activations whose answers are known."""

from __future__ import annotations

import pytest
import torch

from mohd_train.analysis.statistics import CommonActivity, MagnitudeStatistics, active_dims


def magnitude_of(x: torch.Tensor, top: int = 1, **kwargs: int) -> MagnitudeStatistics:
    statistics = MagnitudeStatistics(x.shape[-1], top, **kwargs)
    for start in range(x.shape[0]):  # a sequence at a time: streaming must not matter
        statistics.add(x[start : start + 1])
    return statistics


def test_equal_dims_are_not_sparse() -> None:
    x = torch.ones(2, 3, 8)
    x[:, :, ::2] *= -1  # signs do not count
    found = magnitude_of(x, top=2).summary()
    assert found["tokens"] == 6
    assert found["magnitude"] == pytest.approx(1)
    assert found["share_of_top_dims"] == pytest.approx(2 / 8)
    assert found["share_of_half"] == pytest.approx(0.5)
    assert found["sparsity"] == pytest.approx(0)  # 90% of equal ones: all 8 of 8
    assert found["hoyer"] == pytest.approx(0, abs=1e-6)


def test_one_dim_holds_all() -> None:
    x = torch.zeros(2, 3, 8)
    x[:, 0, 1] = x[:, 1, 6] = x[:, 2, 3] = -5.0
    found = magnitude_of(x).summary()
    assert found["share_of_top_dims"] == pytest.approx(1)
    assert found["sparsity"] == pytest.approx(7 / 8)
    assert found["hoyer"] == pytest.approx(1)
    assert found["magnitude"] == pytest.approx(5 / 8)
    # Each token has its own one: no single dim does for all.
    assert found["share_of_top_dims_same_for_all_tokens"] == pytest.approx(1 / 3)


def test_known_curve_and_the_dims_that_hold_ninety_percent() -> None:
    x = torch.tensor([1.0, -4.0, 2.0, 3.0]).expand(1, 2, 4).contiguous()
    statistics = magnitude_of(x, top=3)
    assert torch.allclose(statistics.curve(), torch.tensor([0.4, 0.7, 0.9, 1.0], dtype=torch.float64))
    found = statistics.summary()
    assert found["sparsity"] == pytest.approx(1 / 4)  # 3 of 4 hold exactly 90%
    assert found["share_by_dims"]["0.5"] == pytest.approx(0.7)


def test_silent_tokens_have_no_shares_and_are_counted() -> None:
    x = torch.zeros(1, 2, 4)
    x[0, 1] = 1.0
    found = magnitude_of(x, by_position=2)
    assert found.summary()["silent_tokens"] == 1
    assert found.summary()["share_of_half"] == pytest.approx(0.5)
    assert found.positions()["share_of_half"] == [None, pytest.approx(0.5)]
    assert magnitude_of(torch.zeros(1, 2, 4)).summary()["sparsity"] is None


def test_shares_by_token_position() -> None:
    x = torch.ones(3, 2, 4)
    x[:, 0, 1:] = 0  # the first token of a sequence has one dim only, as massive activations do
    positions = magnitude_of(x, top=1, by_position=2).positions()
    assert positions["share_of_top_dims"] == pytest.approx([1, 0.25])


def test_exactly_the_share_is_active_and_ties_go_to_the_lower_dim() -> None:
    assert active_dims(torch.ones(2, 10), 0.2).nonzero()[:, 1].tolist() == [0, 1, 0, 1]
    assert active_dims(torch.rand(7, 50), 0.2).sum(dim=-1).tolist() == [10] * 7
    assert active_dims(torch.rand(3, 5), 0.01).sum(dim=-1).tolist() == [1] * 3


def test_common_activity_of_a_constructed_pattern() -> None:
    # 8 dims, 2 active a token. Dim 0 always; beside it dim 1 in the first 4 tokens, then dim 2.
    x = torch.full((1, 8, 8), 0.1)
    x[:, :, 0] = 9
    x[:, :4, 1] = -5
    x[:, 4:, 2] = 5
    statistics = CommonActivity(8, (0.25,), longest=4, window=5)
    statistics.add(x)
    found = statistics.summary()[0]
    assert found["active_per_token"] == 2
    # Windows of 2: seven, of which one (tokens 3, 4) has one dim in common and six have two.
    assert found["common"] == {
        "1": 2.0,
        "2": pytest.approx(13 / 7),
        "3": pytest.approx(10 / 6),
        "4": pytest.approx(7 / 5),
    }
    assert found["independent"]["2"] == pytest.approx(0.5)
    # Windows of 5: four (they begin at 0 .. 3), dim 0 in all five; dims 1 and 2 in 4+1, 3+2, 2+3, 1+4 of them.
    assert found["active_in"] == pytest.approx([5.0, 0.5, 0.5, 0.5, 0.5, 1.0])


def test_independent_tokens_have_in_common_what_chance_gives() -> None:
    x = torch.randn(4, 256, 200)
    statistics = CommonActivity(200, (0.2, 0.8), longest=9)
    for sequence in x:
        statistics.add(sequence[None])
    for found in statistics.summary():
        for n in ("2", "5", "9"):
            assert found["common"][n] == pytest.approx(found["independent"][n], abs=1.5)


def test_no_window_spans_two_sequences() -> None:
    x = torch.zeros(2, 2, 4)
    x[0, :, 0] = x[1, :, 1] = 1
    statistics = CommonActivity(4, (0.25,), longest=3)
    statistics.add(x)
    assert statistics.summary()[0]["common"] == {"1": 1.0, "2": 1.0}
    assert statistics.summary()[0]["active_in"] is None
