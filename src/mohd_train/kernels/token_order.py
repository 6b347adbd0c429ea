"""Tokens in an order in which GEMMs need neither gather nor scatter rows of the wide side.

Tokens with the same choice of specialized sub-dimensions form a group. Groups follow one another so that each choice differs
from the one before in one sub-dimension (a revolving-door order of combinations), and a sub-dimension keeps its slot while it
stays chosen. So the tokens of a sub-dimension are a few spans of neighbours in one slot: with 3 of 7 chosen, 35 groups and 37
spans in place of 7 gathered runs of 3/7 of the tokens each. With one chosen, groups and spans are the runs.

Shapes: T tokens, N sub-dimensions, K active, S shared, P = K - S chosen of M = N - S; G groups.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels.layout import as_rows

MOST_GROUPS = 64  # more would leave a few tokens a group: the runs are gathered then


class TokenOrder(NamedTuple):
    """The order of one component's tokens. "Sorted" tensors hold token `tokens[i]` in row i."""

    tokens: Tensor  # int64 [T]
    places: Tensor  # int64 [T]: its inverse
    pairs: Tensor  # int64 [T*K]: compact row (token * K + slot) that a sorted compact tensor holds in each of its rows
    pair_places: Tensor  # int64 [T*K]: its inverse
    ends: Tensor  # int64 [G]: where each group ends


@functools.cache
def _choices(count: int, chosen: int) -> tuple[tuple[int, ...], ...]:
    """Combinations of `chosen` of `count`, each one swap from the next."""
    if chosen in (0, count):
        return (tuple(range(chosen)),)
    with_last = [(*choice, count - 1) for choice in reversed(_choices(count - 1, chosen - 1))]
    return (*_choices(count - 1, chosen), *with_last)


@functools.cache
def _slots(count: int, chosen: int) -> tuple[tuple[int, ...], ...]:
    """For each group the choice held by slot 0, 1, ...: what stays chosen stays in its slot."""
    slots = [list(_choices(count, chosen)[0])]
    for choice in _choices(count, chosen)[1:]:
        new = [i for i in choice if i not in slots[-1]]
        slots.append([i if i in choice else new[0] for i in slots[-1]])
    return tuple(map(tuple, slots))


@functools.cache
def spans(count: int, chosen: int) -> tuple[tuple[int, int, int, int], ...]:
    """(choice, slot, first group, last group): where a choice stays in a slot, by first group."""
    found = []
    for slot, held in enumerate(zip(*_slots(count, chosen), strict=True)):
        first = 0
        for group in range(1, len(held) + 1):
            if group == len(held) or held[group] != held[first]:
                found.append((held[first], slot, first, group - 1))
                first = group
    return tuple(sorted(found, key=lambda span: span[2]))


@functools.cache
def _ranks(count: int, chosen: int) -> list[int]:
    """Group of a choice, by its code in base `count`."""
    table = [0] * count**chosen
    for rank, choice in enumerate(_choices(count, chosen)):
        table[functools.reduce(lambda code, i: code * count + i, choice, 0)] = rank
    return table


@functools.cache
def _ascending(count: int, chosen: int) -> list[list[int]]:
    """For each group and slot, the place that the slot's choice has in ascending order."""
    return [[sorted(slots).index(i) for i in slots] for slots in _slots(count, chosen)]


def serves(sub_dims: int, active: int, shared: int) -> bool:
    """Whether there are few enough groups, and something to choose."""
    return active > shared and math.comb(sub_dims - shared, active - shared) <= MOST_GROUPS


def token_order(indices_TK: Tensor, sub_dims: int, shared: int) -> TokenOrder:
    """The order of tokens with these choices [T, K]: a stable sort, no host sync."""
    (tokens, active), device = indices_TK.shape, indices_TK.device
    count, chosen = sub_dims - shared, active - shared
    code = indices_TK[:, shared] - shared
    for k in range(shared + 1, active):
        code = code * count + indices_TK[:, k] - shared
    ranks = code if chosen == 1 else torch.tensor(_ranks(count, chosen), device=device)[code]
    ranks, order = torch.sort(ranks, stable=True)
    ends = torch.searchsorted(ranks, torch.arange(math.comb(count, chosen), device=device), right=True)
    slots = torch.arange(shared, device=device).expand(tokens, shared)
    if chosen == 1:
        slots = torch.arange(active, device=device).expand(tokens, active)
    else:
        slots = torch.cat([slots, torch.tensor(_ascending(count, chosen), device=device)[ranks] + shared], 1)
    pairs = (order.unsqueeze(1) * active + slots).reshape(-1)
    return TokenOrder(order, _inverse(order), pairs, _inverse(pairs), ends)


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter(
        0, permutation, torch.arange(permutation.shape[0], device=permutation.device)
    )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[1]), None, None


def permute(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows of x in the order `index`; the gradient is a read through its inverse, not a scatter."""
    if not torch.is_grad_enabled():
        return x.index_select(0, index)
    return _Permute.apply(x, index, inverse)


def sort_compact(x_TKC: Tensor, order: TokenOrder, active: int) -> Tensor:
    """[T, K*C] to [T, K, C] in the tokens' order, slots as the spans want them. K and C stay apart, see `as_rows`."""
    return permute(as_rows(x_TKC, active), order.pairs, order.pair_places).unflatten(0, (-1, active))


def unsort_compact(x_TKC: Tensor, order: TokenOrder) -> Tensor:
    """The way back: [T, K, C] to [T, K*C]."""
    return permute(x_TKC.flatten(0, 1), order.pair_places, order.pairs).unflatten(0, x_TKC.shape[:2]).flatten(1)
