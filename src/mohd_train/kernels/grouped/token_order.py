"""An order of the tokens in which GEMMs neither gather nor scatter rows of the wide operands.

Tokens with the same choice of specialized sub-dimensions form a group. Each group's choice differs from the previous one's in
one sub-dimension (the revolving-door order of combinations), and a sub-dimension keeps its slot while it stays chosen. So the
tokens of a sub-dimension form a few spans, each contiguous and in one slot: with 3 of 7 chosen, 35 groups and 37 spans instead
of 7 gathered runs of 3/7 of the tokens each. With one chosen, every group is a span and a run.

Shapes: T tokens, N sub-dimensions, K active, S shared, P = K - S chosen of M = N - S; G groups.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels.slots import as_rows

MOST_GROUPS = 64  # with more, a group would hold too few tokens, and runs are gathered instead


class TokenOrder(NamedTuple):
    """The order of one component's tokens. Row i of a sorted tensor is token `tokens[i]`."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]: its inverse
    pairs: Tensor  # int64 [T*K]: the compact row (token * K + slot) that each row of a sorted compact tensor holds
    pair_positions: Tensor  # int64 [T*K]: its inverse
    ends: Tensor  # int64 [G]: where each group ends; `selection.select` replaces it by a copy in host memory


@functools.cache
def _choices(count: int, chosen: int) -> tuple[tuple[int, ...], ...]:
    """Combinations of `chosen` of `count`, each one swap from the next."""
    if chosen in (0, count):
        return (tuple(range(chosen)),)
    with_last = [(*choice, count - 1) for choice in reversed(_choices(count - 1, chosen - 1))]
    return (*_choices(count - 1, chosen), *with_last)


@functools.cache
def _slots(count: int, chosen: int) -> tuple[tuple[int, ...], ...]:
    """For each group what slots 0, 1, ... hold: a sub-dimension that stays chosen keeps its slot."""
    slots = [list(_choices(count, chosen)[0])]
    for choice in _choices(count, chosen)[1:]:
        new = [i for i in choice if i not in slots[-1]]
        slots.append([i if i in choice else new[0] for i in slots[-1]])
    return tuple(map(tuple, slots))


@functools.cache
def spans(count: int, chosen: int) -> tuple[tuple[int, int, int, int], ...]:
    """(sub-dimension, slot, first group, last group) of every span, ordered by first group."""
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
    """[P, M]: what sub-dimension m, as element p of an ascending choice, adds to the choice's rank in revolving-door order.

    The rank of c_1 < ... < c_P, counted from 1, is the sum of (-1)^(P-i) C(c_i, i), minus one where P is odd.
    """
    terms = [[(-1) ** (chosen - i) * math.comb(c, i) for c in range(1, count + 1)] for i in range(1, chosen + 1)]
    terms[0] = [term - chosen % 2 for term in terms[0]]
    return terms


@functools.cache
def _slot_tables(count: int, chosen: int) -> list[list[list[int]]]:
    """[2, G, P]: for each group the ascending index of what each slot holds, and the inverse."""
    ascending = [[sorted(slots).index(i) for i in slots] for slots in _slots(count, chosen)]
    return [ascending, [[indices.index(i) for i in range(chosen)] for indices in ascending]]


# Constants on their device, by what determines them. An upload waits for the device, so each is uploaded once.
_UPLOADED: dict[tuple[str, int, int, torch.device], Tensor] = {}


@torch.compiler.assume_constant_result  # compiled code holds the uploaded tensor, and uploads nothing when it runs
def _constant(name: str, count: int, chosen: int, device: torch.device) -> Tensor:
    key = (name, count, chosen, device)
    if key not in _UPLOADED:
        values = {"rank terms": _rank_terms, "slot tables": _slot_tables}[name](count, chosen)
        with torch.inference_mode(False):
            tensor = torch.tensor(values, dtype=torch.int64, device=device)
        if type(tensor) is not Tensor:  # a fake tensor is of no use to the next caller
            return tensor
        _UPLOADED[key] = tensor
    return _UPLOADED[key]


def supports(sub_dims: int, active: int, shared: int) -> bool:
    """Whether there is something to choose, and few enough groups."""
    return active > shared and math.comb(sub_dims - shared, active - shared) <= MOST_GROUPS


def token_order(indices_TK: Tensor, sub_dims: int, shared: int) -> TokenOrder:
    """The order of tokens with these choices [T, K]: a stable sort, and another for its inverse. Never waits for the device."""
    (tokens, active), device = indices_TK.shape, indices_TK.device
    count, chosen = sub_dims - shared, active - shared
    ranks = group_ranks(indices_TK[:, shared:] - shared, count)
    by_rank, order = torch.sort(ranks, stable=True)
    positions = inverse(order)
    ends = torch.searchsorted(by_rank, torch.arange(math.comb(count, chosen), device=device), right=True)
    if chosen == 1:
        sorted_slots = slots = torch.arange(active, device=device).expand(tokens, active)
    else:
        tables = _constant("slot tables", count, chosen, device)
        always = torch.arange(shared, device=device).expand(tokens, shared)
        sorted_slots = torch.cat([always, tables[0].index_select(0, by_rank) + shared], 1)
        slots = torch.cat([always, tables[1].index_select(0, ranks) + shared], 1)
    pairs = (order.unsqueeze(1) * active + sorted_slots).reshape(-1)
    pair_positions = (positions.unsqueeze(1) * active + slots).reshape(-1)
    return TokenOrder(order, positions, pairs, pair_positions, ends)


def group_ranks(chosen_TP: Tensor, count: int) -> Tensor:
    """int64 [T]: the group of each token's choice. `chosen_TP`: P of 0 .. count - 1, ascending."""
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
    """The inverse, by a sort: in deterministic mode CUDA sorts for a write by index too, and also waits for the host."""
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
    """Rows of x in the order `index`. The gradient reads through the inverse instead of scattering."""
    if not torch.is_grad_enabled():
        return x.index_select(0, index)
    return _Permute.apply(x, index, inverse)


def sort_compact(x_TKC: Tensor, order: TokenOrder, active: int) -> Tensor:
    """[T, K*C] to sorted [T, K, C], with the slots of the spans. K and C stay separate dims, see `as_rows`."""
    return permute(as_rows(x_TKC, active), order.pairs, order.pair_positions).unflatten(0, (-1, active))


def unsort_compact(x_TKC: Tensor, order: TokenOrder) -> Tensor:
    """The inverse of `sort_compact`: [T, K, C] to [T, K*C]."""
    return permute(x_TKC.flatten(0, 1), order.pair_positions, order.pairs).unflatten(0, x_TKC.shape[:2]).flatten(1)
