"""The order of tokens by choice: what spans promise to the GEMMs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.routing import choose

from mohd_train.kernels.grouped import token_order


@pytest.mark.parametrize(("count", "chosen"), [(1, 1), (5, 1), (7, 3), (6, 2), (4, 4)])
def test_choices_differ_in_one_from_the_one_before(count: int, chosen: int) -> None:
    choices = token_order._choices(count, chosen)
    assert sorted(choices) == sorted(itertools.combinations(range(count), chosen))
    assert all(len(set(a) & set(b)) == chosen - 1 for a, b in itertools.pairwise(choices))
    assert len(token_order.spans(count, chosen)) == chosen + math.comb(count, chosen) - 1


@pytest.mark.parametrize(("count", "chosen"), [(5, 1), (7, 3), (8, 5), (11, 2), (4, 4), (12, 11), (64, 63)])
def test_ranks_number_the_choices_in_order(count: int, chosen: int) -> None:
    choices = torch.tensor(token_order._choices(count, chosen))
    assert torch.equal(token_order.group_ranks(choices, count), torch.arange(len(choices)))


def test_a_constant_outlives_inference_mode() -> None:
    token_order._UPLOADED.clear()
    with torch.inference_mode():
        token_order.token_order(choose(9, 7, 3, 0), 7, 0)
    assert len(token_order._UPLOADED) == 2
    assert not any(tensor.is_inference() for tensor in token_order._UPLOADED.values())


@pytest.mark.parametrize(
    ("tokens", "n", "k", "s"), [(50, 16, 12, 9), (30, 12, 11, 0), (50, 8, 4, 3), (1, 16, 12, 9), (9, 6, 2, 0)]
)
def test_a_span_holds_the_pairs_of_its_sub_dimension(tokens: int, n: int, k: int, s: int) -> None:
    indices = choose(tokens, n, k, s)
    order = token_order.token_order(indices, n, s)
    assert torch.equal(order.tokens[order.positions], torch.arange(tokens))
    assert torch.equal(order.pairs[order.pair_positions], torch.arange(tokens * k))
    assert torch.equal(order.pairs.view(tokens, k) // k, order.tokens.unsqueeze(1).expand(tokens, k))
    held = indices.reshape(-1)[order.pairs].view(tokens, k)
    assert torch.equal(held[:, :s], torch.arange(s).expand(tokens, s))
    bounds, seen = [0, *order.ends.tolist()], 0
    for choice, slot, first, last in token_order.spans(n - s, k - s):
        part = held[bounds[first] : bounds[last + 1], s + slot]
        assert (part == s + choice).all()
        seen += part.numel()
    assert seen == tokens * (k - s)


def test_too_many_choices_are_not_sorted_by() -> None:
    assert token_order.supports(16, 12, 9)
    assert not token_order.supports(16, 4, 0)
    assert not token_order.supports(4, 4, 4)
