"""Slots, scores and counts of a choice, compared or searched for, against torch's gather, scatter and bincount."""

from __future__ import annotations

import pytest
import torch
from support.routing import choose

from mohd_train.kernels import ops, slots

SIZES = [(13, 8, 4, 3), (13, 16, 12, 9), (1, 5, 1, 0), (9, 4, 4, 4), (7, 256, 40, 8), (0, 8, 4, 3)]


@pytest.fixture(params=["as it comes", "compared", "searched for"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as it comes":
        monkeypatch.setattr(slots, "MOST_COMPARED", 1 << 20 if request.param == "compared" else 0)


@pytest.mark.parametrize(("tokens", "n", "k", "s"), SIZES)
def test_slots_are_the_inverse_of_indices(tokens: int, n: int, k: int, s: int) -> None:
    indices = choose(tokens, n, k, s)
    want = torch.full((tokens, n), -1).scatter(1, indices, torch.arange(k).expand(tokens, k))
    assert torch.equal(slots.slots_of(indices, n), want)


@pytest.mark.parametrize(("tokens", "n", "k", "s"), SIZES)
def test_take_slots_is_a_gather(tokens: int, n: int, k: int, s: int) -> None:
    indices = choose(tokens, n, k, s)
    scores = torch.randn(tokens, n, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(tokens, k, dtype=torch.float64)
    got, want = ops.gather_scores(scores, indices), scores.gather(1, indices)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(part, scores, slope)[0] for part in (got, want)))
    with torch.no_grad():
        assert torch.equal(ops.gather_scores(scores, indices), want)


def test_take_slots_traced() -> None:
    indices, scores = choose(13, 8, 4, 3), torch.randn(13, 8, requires_grad=True)
    run = torch.compile(lambda scores: ops.gather_scores(scores, indices).square(), fullgraph=True, backend="aot_eager")
    want = scores.gather(1, indices).square()
    assert torch.equal(run(scores), want)
    got, want = (torch.autograd.grad(part.sum(), scores)[0] for part in (run(scores), want))
    assert torch.equal(got, want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "n", "k", "s"), SIZES)
def test_count_selected_is_a_bincount(tokens: int, n: int, k: int, s: int, masked: bool) -> None:
    indices, mask = choose(tokens, n, k, s), torch.arange(tokens) % 3 > 0
    counted = indices[mask] if masked else indices
    assert torch.equal(
        ops.count_selected(indices, n, mask if masked else None), counted.flatten().bincount(minlength=n)
    )
