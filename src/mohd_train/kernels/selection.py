"""What one component's routing chose, and the sort that lets tokens of one specialized sub-dimension share a GEMM.

Shapes: T tokens, N sub-dimensions, K active ones a token, S shared ones, P = K - S specialized choices a token.
A (token, slot) pair is the row ``token * K + slot`` of a compact tensor [T*K, C].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels import few_tokens
from mohd_train.kernels.token_order import TokenOrder, serves, token_order

# Pairs in a tile: a tile holds pairs of one sub-dimension, so that reductions over a run need no data-dependent shape.
TILE = 8


class Selection(NamedTuple):
    """The sub-dimensions one component's router chose, with what the backends derive from them."""

    indices_TK: Tensor  # int64; columns 0..S-1 hold 0..S-1, the rest the specialized ids, ascending
    sub_dims: int  # N
    shared: int  # S
    rows: Tensor  # int64 [T*K]: token * N + sub-dimension, rows of a full-width tensor seen as [T*N, C]
    slots_TN: Tensor  # int64: the slot that holds a sub-dimension, -1 when it is inactive
    pairs: Tensor  # int64 [T*P]: specialized pairs (token * K + slot), by sub-dimension, then by token
    ends: Tensor  # int64 [N-S]: where each specialized sub-dimension's run of `pairs` ends
    tile_tokens: Tensor | None = None  # int64 [M, B], for triton: tiles of tokens with the same choice, -1 fills up
    order: TokenOrder | None = None  # for grouped: tokens sorted by choice, where there are few choices
    choices: few_tokens.Choices | None = None  # for grouped, in place of any sort: a few tokens without gradients


def select(indices_TK: Tensor, sub_dims: int, shared: int, tile: int | None = None, sort: bool = False) -> Selection:
    """A selection with its sort: one stable sort over all specialized pairs, run ends as a tensor, no host sync.

    `tile` adds tiles of so many tokens of the same choice, `sort` the tokens' order by choice (or, decoding, the choices).
    """
    few = sort and indices_TK.shape[0] <= few_tokens.MOST_TOKENS and _decoding()
    by_choice = sort and not few and serves(sub_dims, indices_TK.shape[1], shared)
    order = token_order(indices_TK, sub_dims, shared) if by_choice else None
    tile_tokens = None if tile is None else same_choice(indices_TK, sub_dims, shared, tile)
    tokens, active = indices_TK.shape
    chosen, device = active - shared, indices_TK.device
    rows = (indices_TK + torch.arange(tokens, device=device).unsqueeze(1) * sub_dims).reshape(-1)
    slots_TN = torch.full((tokens, sub_dims), -1, dtype=torch.int64, device=device)
    slots_TN = slots_TN.scatter(1, indices_TK, torch.arange(active, device=device).expand(tokens, active))
    ids = torch.arange(shared, sub_dims, device=device)
    if chosen == 0 or few:
        choices = few_tokens.choices_of(indices_TK, shared) if few else None
        none, ends = indices_TK.new_zeros(0), torch.zeros_like(ids)
        return Selection(indices_TK, sub_dims, shared, rows, slots_TN, none, ends, tile_tokens, None, choices)
    keys, by_id = torch.sort(indices_TK[:, shared:].reshape(-1), stable=True)
    pairs = by_id // chosen * active + shared + by_id % chosen
    ends = torch.searchsorted(keys, ids, right=True)
    return Selection(indices_TK, sub_dims, shared, rows, slots_TN, pairs, ends, tile_tokens, order)


def _decoding() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def same_choice(indices_TK: Tensor, sub_dims: int, shared: int, size: int) -> Tensor:
    """Tokens in tiles of `size`, all of a tile with the same active sub-dimensions: int64 [M, size], -1 fills a tile up.

    M = T // size + min(T, choices there are): from shapes alone.
    """
    tokens, active = indices_TK.shape
    key = torch.zeros_like(indices_TK[:, 0])
    for k in range(shared, active):
        key = key * sub_dims + indices_TK[:, k]
    key, order = torch.sort(key, stable=True)
    run = torch.cat([torch.zeros_like(key[:1]), (key[1:] != key[:-1]).long()]).cumsum(0)
    count = min(tokens, math.comb(sub_dims - shared, active - shared))
    ends = torch.searchsorted(run, torch.arange(count, device=run.device), right=True)
    return tiles(order, ends, size)[0]


def tiles(pairs: Tensor, ends: Tensor, size: int = TILE) -> tuple[Tensor, Tensor]:
    """Rows in tiles of one run each: ([M, size] of `pairs`, -1 where a tile is not full; [M] the tile's run).

    M = len(pairs) // size + len(ends) is static: each run wastes less than a tile. An empty tile belongs to the last run.
    """
    count = pairs.shape[0] // size + ends.shape[0]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tile_ends = ((ends - starts + size - 1) // size).cumsum(0)
    tile_starts = torch.cat([ends.new_zeros(1), tile_ends[:-1]])
    place = torch.searchsorted(tile_ends, torch.arange(count, device=pairs.device), right=True)
    place = place.clamp(max=ends.shape[0] - 1)
    first = starts[place] + (torch.arange(count, device=pairs.device) - tile_starts[place]) * size
    position = first.unsqueeze(1) + torch.arange(size, device=pairs.device)
    inside = position < ends[place].unsqueeze(1)
    return torch.where(inside, pairs[position.clamp(max=pairs.shape[0] - 1)], -1), place
