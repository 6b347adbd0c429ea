"""Streamed statistics against activations whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from mohd_train.analysis.statistics import CommonActivity, MagnitudeStatistics, active_dims, gaussian


def magnitude_of(x: torch.Tensor, top: int = 1, by_position: int = 0, **kwargs) -> MagnitudeStatistics:
    """Of |x|, whose numbers are easy to see; squares where a test is about them."""
    statistics = MagnitudeStatistics(x.shape[-1], top, by_position, **{"magnitude": "absolute", **kwargs})
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
    assert found["concentration"] == pytest.approx(0)  # 90% of equal ones: all 8 of 8
    assert found["hoyer"] == pytest.approx(0, abs=1e-6)


def test_one_dim_holds_all() -> None:
    x = torch.zeros(2, 3, 8)
    x[:, 0, 1] = x[:, 1, 6] = x[:, 2, 3] = -5.0
    found = magnitude_of(x).summary()
    assert found["share_of_top_dims"] == pytest.approx(1)
    assert found["concentration"] == pytest.approx(7 / 8)
    assert found["sparsity"] == pytest.approx(7 / 8)  # seven zeros
    assert found["hoyer"] == pytest.approx(1)
    assert found["magnitude"] == pytest.approx(5 / 8)
    # Each token has its own one: no single dim does for all.
    assert found["share_of_top_dims_same_for_all_tokens"] == pytest.approx(1 / 3)


def test_known_curve_and_the_dims_that_hold_ninety_percent() -> None:
    x = torch.tensor([1.0, -4.0, 2.0, 3.0]).expand(1, 2, 4).contiguous()
    statistics = magnitude_of(x, top=3)
    assert torch.allclose(statistics.curve(), torch.tensor([0.4, 0.7, 0.9, 1.0], dtype=torch.float64))
    found = statistics.summary()
    assert found["concentration"] == pytest.approx(1 / 4)  # 3 of 4 hold exactly 90%
    assert found["share_by_dims"]["0.5"] == pytest.approx(0.7)


def test_the_magnitude_of_a_dim_is_its_square() -> None:
    """Eq. 1: "the magnitude of each dimension as the square of its activation value"."""
    x = torch.tensor([1.0, -4.0, 2.0, 3.0]).expand(1, 2, 4).contiguous()
    statistics = MagnitudeStatistics(4, 3)
    per_token = statistics.add(x)
    assert torch.allclose(per_token, torch.full((1, 2), 30 / 4, dtype=torch.float64))
    assert torch.allclose(statistics.curve(), torch.tensor([16, 25, 29, 30], dtype=torch.float64) / 30)
    found = statistics.summary()
    assert found["magnitude"] == pytest.approx(30 / 4)
    assert found["share_of_top_dims"] == pytest.approx(29 / 30)
    assert found["concentration"] == pytest.approx(1 / 4)  # 25 of 30 are too little, 29 are enough
    l2 = math.sqrt(16**2 + 9**2 + 4**2 + 1)
    assert found["hoyer"] == pytest.approx((2 - 30 / l2) / (2 - 1))


@pytest.mark.parametrize(("magnitude", "below"), [("square", 3 / 4), ("absolute", 2 / 4)])
def test_sparsity_is_the_share_below_epsilon(magnitude: str, below: float) -> None:
    """Eq. 2, written out: 0.01, 0.25 and 0.5 have squares below 0.26; two of them are below it themselves."""
    x = torch.tensor([0.01, -0.25, 0.5, -2.0]).expand(1, 3, 4).contiguous()
    found = magnitude_of(x, magnitude=magnitude, epsilon=0.26).summary()
    assert found["sparsity"] == pytest.approx(below)
    values = x[0, 0].square() if magnitude == "square" else x[0, 0].abs()
    assert found["sparsity_relative"] == pytest.approx(float((values < 0.26 * values.mean()).float().mean()))
    scaled = magnitude_of(1000 * x, magnitude=magnitude, epsilon=0.26).summary()
    assert scaled["sparsity_relative"] == found["sparsity_relative"]  # the scale of a layer does not matter to it
    assert scaled["sparsity"] == 0


@pytest.mark.parametrize("magnitude", ["square", "absolute"])
def test_gaussian_sparsity_of_eq_2_is_that_of_noise_as_loud_as_each_token(magnitude: str) -> None:
    loudness = torch.tensor([0.05, 0.3, 2.0])[None, :, None]
    x = loudness * torch.randn(64, 3, 2048)
    found = magnitude_of(x, magnitude=magnitude, epsilon=0.01).summary()
    assert found["sparsity_gaussian"] == pytest.approx(found["sparsity"], abs=2e-3)
    assert found["sparsity_gaussian"] > 0.05


# What p of the dims hold of Gaussian noise, from its density: with P(|z| > t) = p, squares 2 t phi(t) + p, |x| exp(-t^2 / 2).
@pytest.mark.parametrize(
    ("magnitude", "top", "half"),
    [("square", 71.57, 92.87), ("absolute", 50.75, 79.66)],
)
def test_gaussian_noise_of_4096_dims_holds_what_the_paper_reports_of_llama(
    magnitude: str, top: float, half: float
) -> None:
    """The paper: 71.96% and 92.54% for LLaMA2-7B. By squares, that is Gaussian noise within half a point; by |x|, it is not."""
    found = gaussian(4096, 1000, magnitude)
    assert 100 * found["share_of_top_dims"] == pytest.approx(top, abs=0.05)
    assert 100 * found["share_of_half"] == pytest.approx(half, abs=0.05)
    for share, value in ((1000 / 4096, "share_of_top_dims"), (0.5, "share_of_half")):
        t = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - share / 2, dtype=torch.float64)).item()
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        exact = 2 * t * density + share if magnitude == "square" else math.exp(-t * t / 2)
        assert found[value] == pytest.approx(exact, abs=1e-3)
    below = math.erf(math.sqrt(0.01 / 2)) if magnitude == "square" else math.erf(0.01 / math.sqrt(2))
    assert found["sparsity"] == pytest.approx(below, abs=1e-3)
    assert len(found["curve"]) == 4096
    assert (abs(71.96 - top) < 0.5 and abs(92.54 - half) < 0.5) == (magnitude == "square")


def test_silent_tokens_have_no_shares_and_are_counted() -> None:
    x = torch.zeros(1, 2, 4)
    x[0, 1] = 1.0
    found = magnitude_of(x, by_position=2)
    assert found.summary()["silent_tokens"] == 1
    assert found.summary()["share_of_half"] == pytest.approx(0.5)
    assert found.positions()["share_of_half"] == [None, pytest.approx(0.5)]
    assert magnitude_of(torch.zeros(1, 2, 4)).summary()["concentration"] is None
    assert magnitude_of(torch.zeros(1, 2, 4)).summary()["sparsity_relative"] is None
    assert found.summary()["sparsity"] == pytest.approx(0.5)  # its zeros are below any threshold


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


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.8, 0.95])
def test_every_threshold_comes_from_one_histogram(share: float) -> None:
    """Against the definition written out: dims active in every token of every window of n."""
    x = torch.randn(2, 12, 20).round(decimals=1)  # with ties
    statistics = CommonActivity(20, (0.2,), longest=5)
    for sequence in x:
        statistics.add(sequence[None])
    found = statistics.common(share)
    assert sorted(found) == ["1", "2", "3", "4", "5"]
    active = active_dims(x.abs(), share)
    for n in range(1, 6):
        windows = [active[b, t : t + n].all(dim=0).sum().item() for b in range(2) for t in range(12 - n + 1)]
        assert found[str(n)] == pytest.approx(sum(windows) / len(windows))


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
