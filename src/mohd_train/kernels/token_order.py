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
    ends: Tensor  # int64 [G]: where each group ends; in host memory once `selection.select` has brought it there


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
def _rank_terms(count: int, chosen: int) -> list[list[int]]:
    """[P, M]: what each place of an ascending choice adds to its rank in revolving-door order, by the sub-dimension there.

    The rank of c_1 < ... < c_P, counted from 1, is the sum of (-1)^(P-i) C(c_i, i), less one where P is odd.
    """
    terms = [[(-1) ** (chosen - i) * math.comb(c, i) for c in range(1, count + 1)] for i in range(1, chosen + 1)]
    terms[0] = [term - chosen % 2 for term in terms[0]]
    return terms


@functools.cache
def _slot_tables(count: int, chosen: int) -> list[list[list[int]]]:
    """[2, G, P]: for each group and slot the place that the slot's choice has in ascending order, and the inverse."""
    ascending = [[sorted(slots).index(i) for i in slots] for slots in _slots(count, chosen)]
    return [ascending, [[places.index(i) for i in range(chosen)] for places in ascending]]


# Constants on their device, by what they were made from: an upload waits for the device, so each takes place once.
_UPLOADED: dict[tuple[str, int, int, torch.device], Tensor] = {}


@torch.compiler.assume_constant_result  # traced code takes the uploaded tensor in, rather than uploading it each time it runs
def _constant(name: str, count: int, chosen: int, device: torch.device) -> Tensor:
    key = (name, count, chosen, device)
    if key not in _UPLOADED:
        made = {"rank terms": _rank_terms, "slot tables": _slot_tables}[name](count, chosen)
        with torch.inference_mode(False):
            tensor = torch.tensor(made, dtype=torch.int64, device=device)
        if type(tensor) is not Tensor:  # a fake one means nothing to the next caller
            return tensor
        _UPLOADED[key] = tensor
    return _UPLOADED[key]


def supports(sub_dims: int, active: int, shared: int) -> bool:
    """Whether there are few enough groups, and something to choose."""
    return active > shared and math.comb(sub_dims - shared, active - shared) <= MOST_GROUPS


def token_order(indices_TK: Tensor, sub_dims: int, shared: int) -> TokenOrder:
    """The order of tokens with these choices [T, K]: a stable sort, and a second one for its inverse. No host sync."""
    (tokens, active), device = indices_TK.shape, indices_TK.device
    count, chosen = sub_dims - shared, active - shared
    ranks = group_ranks(indices_TK[:, shared:] - shared, count)
    by_rank, order = torch.sort(ranks, stable=True)
    places = inverse(order)
    ends = torch.searchsorted(by_rank, torch.arange(math.comb(count, chosen), device=device), right=True)
    if chosen == 1:
        held = found = torch.arange(active, device=device).expand(tokens, active)
    else:
        tables = _constant("slot tables", count, chosen, device)
        always = torch.arange(shared, device=device).expand(tokens, shared)
        held = torch.cat([always, tables[0].index_select(0, by_rank) + shared], 1)
        found = torch.cat([always, tables[1].index_select(0, ranks) + shared], 1)
    pairs = (order.unsqueeze(1) * active + held).reshape(-1)
    pair_places = (places.unsqueeze(1) * active + found).reshape(-1)
    return TokenOrder(order, places, pairs, pair_places, ends)


def group_ranks(chosen_TP: Tensor, count: int) -> Tensor:
    """int64 [T]: the group of each token's choice, P of `count`, ascending from 0."""
    chosen = chosen_TP.shape[1]
    if chosen == 1:
        return chosen_TP[:, 0]
    terms = _constant("rank terms", count, chosen, chosen_TP.device)
    return (
        terms.view(-1)
        .index_select(0, (chosen_TP + torch.arange(chosen, device=chosen_TP.device) * count).reshape(-1))
        .view_as(chosen_TP)
        .sum(1)
    )


def inverse(permutation: Tensor) -> Tensor:
    """A sort: writing by index would be one too in deterministic mode on CUDA, and wait for the host."""
    return torch.argsort(permutation)


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
