"""What one component's routing chose, and the sort that lets tokens of one specialized sub-dimension share a GEMM.

Shapes: T tokens, N sub-dimensions, K active ones a token, S shared ones, P = K - S specialized choices a token.
A (token, slot) pair is the row ``token * K + slot`` of a compact tensor [T*K, C].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels import few_tokens, token_order
from mohd_train.kernels.host import ends_to_host
from mohd_train.kernels.slots import slots_of
from mohd_train.kernels.token_order import TokenOrder

# Pairs in a tile: a tile holds pairs of one sub-dimension, so that reductions over a run need no data-dependent shape.
TILE = 8


class Selection(NamedTuple):
    """The sub-dimensions one component's router chose, with what the backends derive from them."""

    indices_TK: Tensor  # int64; columns 0..S-1 hold 0..S-1, the rest the specialized ids, ascending
    sub_dims: int  # N
    shared: int  # S
    path: str  # see `choose_path`
    rows: Tensor  # int64 [T*K]: token * N + sub-dimension, rows of a full-width tensor seen as [T*N, C]
    slots_TN: Tensor  # int64: the slot that holds a sub-dimension, -1 when it is inactive
    pairs: Tensor  # int64 [T*P]: specialized pairs (token * K + slot), by sub-dimension, then by token
    ends: Tensor  # int64 [N-S]: where each specialized sub-dimension's run of `pairs` ends
    host_ends: Tensor | None = None  # for grouped: the same in host memory
    pair_places_TP: Tensor | None = None  # int64, for gathered_runs: where in `pairs` each of a token's pairs stands
    tile_tokens: Tensor | None = None  # int64 [M, B], for triton: tiles of tokens with the same choice, -1 fills up
    order: TokenOrder | None = None  # for sorted_spans
    choices: few_tokens.Choices | None = None  # for few_tokens, in place of any sort


def choose_path(backend: str, tokens: int, sub_dims: int, active: int, shared: int) -> str:
    """What runs a selection's products: the only place where that is decided.

    ``reference`` and ``triton`` are backends of one path. ``grouped`` has three: ``few_tokens`` where no gradient is wanted of a
    few tokens (decoding), ``sorted_spans`` where there are few choices to sort tokens by, ``gathered_runs`` for the rest.
    """
    if backend != "grouped":
        return backend
    decoding = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if decoding and tokens <= few_tokens.MOST_TOKENS:
        return "few_tokens"
    return "sorted_spans" if token_order.supports(sub_dims, active, shared) else "gathered_runs"


def select(indices_TK: Tensor, sub_dims: int, shared: int, path: str, tile: int | None = None) -> Selection:
    """A selection with what `path` needs: stable sorts, run ends as a tensor. `tile`: tokens in a tile, for triton.

    Host sync on CUDA: one on the paths of ``grouped`` (the group ends, or the choices of a few tokens), none for ``triton``.
    """
    (tokens, active), device = indices_TK.shape, indices_TK.device
    chosen = active - shared
    rows = (indices_TK + torch.arange(tokens, device=device).unsqueeze(1) * sub_dims).reshape(-1)
    always = torch.arange(shared, device=device).expand(tokens, shared)
    specialized = slots_of(indices_TK[:, shared:] - shared, sub_dims - shared)
    slots_TN = torch.cat([always, torch.where(specialized >= 0, specialized + shared, -1)], 1)
    ids = torch.arange(shared, sub_dims, device=device)
    if chosen == 0 or path == "few_tokens":
        pairs, ends = indices_TK.new_zeros(0), torch.zeros_like(ids)
    else:
        keys, by_id = torch.sort(indices_TK[:, shared:].reshape(-1), stable=True)
        pairs = by_id // chosen * active + shared + by_id % chosen
        ends = torch.searchsorted(keys, ids, right=True)
    more: dict[str, Any] = {}  # torch.compile traces no NamedTuple's _replace
    if path == "triton":
        assert tile is not None
        more["tile_tokens"] = same_choice(indices_TK, sub_dims, shared, tile)
    elif path == "few_tokens":
        more["choices"] = few_tokens.choices_of(indices_TK, shared)
    elif path == "sorted_spans":
        order = token_order.token_order(indices_TK, sub_dims, shared)
        group_ends, more["host_ends"] = ends_to_host(order.ends, ends)
        more["order"] = TokenOrder(order.tokens, order.places, order.pairs, order.pair_places, group_ends)
    elif path == "gathered_runs":
        places = token_order.inverse(by_id) if chosen else pairs
        more["pair_places_TP"] = places.view(tokens, chosen)
        (more["host_ends"],) = ends_to_host(ends)
    return Selection(indices_TK, sub_dims, shared, path, rows, slots_TN, pairs, ends, **more)


def same_choice(indices_TK: Tensor, sub_dims: int, shared: int, size: int) -> Tensor:
    """Tokens in tiles of `size`, all of a tile with the same active sub-dimensions: int64 [M, size], -1 fills a tile up.

    M = T // size + min(T, choices there are): from shapes alone.
    """
    tokens, active = indices_TK.shape
    keys = _choice_keys(indices_TK[:, shared:], sub_dims)
    order = torch.arange(tokens, device=indices_TK.device)
    for key in reversed(keys):  # by the last first, each sort stable: by all of them in the end
        order = order.index_select(0, torch.sort(key.index_select(0, order), stable=True).indices)
    differs = torch.zeros_like(order[1:], dtype=torch.bool)
    for key in keys:
        key = key.index_select(0, order)
        differs = differs | (key[1:] != key[:-1])
    run = torch.cat([torch.zeros_like(order[:1]), differs.long()]).cumsum(0)
    count = min(tokens, math.comb(sub_dims - shared, active - shared))
    ends = torch.searchsorted(run, torch.arange(count, device=run.device), right=True)
    return tiles(order, ends, size)[0]


def _choice_keys(chosen_TP: Tensor, sub_dims: int) -> list[Tensor]:
    """int64 [T] each, which together tell choices apart: as many as it takes for none to overflow (256 to the 8th is 2^64)."""
    digits = max(1, int(62 // math.log2(max(2, sub_dims))))
    keys = []
    for start in range(0, chosen_TP.shape[1], digits):
        key = chosen_TP[:, start]
        for k in range(start + 1, min(start + digits, chosen_TP.shape[1])):
            key = key * sub_dims + chosen_TP[:, k]
        keys.append(key)
    return keys


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
