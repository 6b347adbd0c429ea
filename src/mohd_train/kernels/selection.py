"""What one component's router chose, the path that its products take, and the sorts that let tokens share a GEMM.

Shapes: T tokens, N sub-dimensions, K active per token, S shared, P = K - S specialized choices per token.
A (token, slot) pair is the row ``token * K + slot`` of a compact tensor [T*K, C]. A run is the pairs of one sub-dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels.grouped import few_tokens, token_order
from mohd_train.kernels.slots import slots_of

# Pairs in a tile. All pairs of a tile belong to one run, so that a reduction over a run needs no data-dependent shape.
TILE = 8
# `masked` does N / K times the arithmetic in far fewer operations. On CUDA that should pay where a token uses half of the
# sub-dimensions or more: by runs, layers of 50% and 75% took 2 and 5 times LLaMA's time. Elsewhere it pays with many runs.
CUDA_SHARE = 1 / 2
MOST_RUNS = 32
LEAST_SHARE = 1 / 4


class Selection(NamedTuple):
    """The sub-dimensions that one component's router chose, with what the backends derive from them."""

    indices_TK: Tensor  # int64; columns 0..S-1 hold 0..S-1, the rest the specialized ids, ascending
    sub_dims: int  # N
    shared: int  # S
    path: str  # see `choose_path`
    rows: Tensor  # int64 [T*K]: token * N + sub-dimension, rows of a full-width tensor seen as [T*N, C]
    slots_TN: Tensor  # int64: the slot that holds a sub-dimension, -1 where it is inactive
    pairs: Tensor  # int64 [T*P]: specialized pairs (token * K + slot), by sub-dimension, then by token
    ends: Tensor  # int64 [N-S]: where the run of each specialized sub-dimension ends in `pairs`
    host_ends: Tensor | None = None  # for grouped: `ends` in host memory
    pair_positions_TP: Tensor | None = None  # int64, for gathered_runs: the position in `pairs` of each pair of a token
    tile_tokens: Tensor | None = None  # int64 [M, B], for triton: tiles of tokens with the same choice, padded with -1
    order: token_order.TokenOrder | None = None  # for sorted_spans
    choices: few_tokens.Choices | None = None  # for few_tokens, which sorts nothing


def is_eager_inference() -> bool:
    """Whether autograd and torch.compile are off, as in decoding, where a registered op would cost tens of microseconds."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


_pretended: list[str] = []


@contextmanager
def paths_as_on(device: str) -> Iterator[None]:
    """Chooses paths as on `device` (`cuda`), wherever the tensors are, to estimate what would run there."""
    _pretended.append(device)
    try:
        yield
    finally:
        _pretended.pop()


def choose_path(backend: str, device: str, tokens: int, sub_dims: int, active: int, shared: int) -> str:
    """The path that a selection's products take; nothing else decides it.

    ``reference`` and ``triton`` have one path each. ``grouped`` has four: ``few_tokens`` for a few tokens without gradients
    (decoding), ``sorted_spans`` where there are few possible choices to sort tokens by, ``masked`` for many narrow sub-dimensions
    (Fig. 12b) and on CUDA for half of them or more, ``gathered_runs`` otherwise.
    """
    if backend != "grouped":
        return backend
    device = _pretended[-1] if _pretended else device
    if is_eager_inference() and tokens <= few_tokens.MOST_TOKENS:
        return "few_tokens"
    if device == "cuda" and active >= CUDA_SHARE * sub_dims:
        return "masked"
    if token_order.supports(sub_dims, active, shared):
        return "sorted_spans"
    is_masked = sub_dims - shared > MOST_RUNS and active >= LEAST_SHARE * sub_dims
    return "masked" if is_masked else "gathered_runs"


def select(indices_TK: Tensor, sub_dims: int, shared: int, path: str, tile: int | None = None) -> Selection:
    """The selection with what `path` needs. `tile`: tokens in a tile, for triton.

    On CUDA the paths of ``grouped`` wait for the device once (for the ends, or the choices of a few tokens), ``masked`` and
    ``triton`` never.
    """
    (tokens, active), device = indices_TK.shape, indices_TK.device
    chosen = active - shared
    rows = (indices_TK + torch.arange(tokens, device=device).unsqueeze(1) * sub_dims).reshape(-1)
    always = torch.arange(shared, device=device).expand(tokens, shared)
    specialized = slots_of(indices_TK[:, shared:] - shared, sub_dims - shared)
    slots_TN = torch.cat([always, torch.where(specialized >= 0, specialized + shared, -1)], 1)
    ids = torch.arange(shared, sub_dims, device=device)
    if chosen == 0 or path in ("few_tokens", "masked"):
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
        more["order"] = token_order.TokenOrder(
            order.tokens, order.positions, order.pairs, order.pair_positions, group_ends
        )
    elif path == "gathered_runs":
        positions = token_order.inverse(by_id) if chosen else pairs
        more["pair_positions_TP"] = positions.view(tokens, chosen)
        (more["host_ends"],) = ends_to_host(ends)
    return Selection(indices_TK, sub_dims, shared, path, rows, slots_TN, pairs, ends, **more)


@torch.library.custom_op("mohd::ends_to_host", mutates_args=())
def _ends_to_host(ends: Tensor) -> Tensor:
    return ends.to("cpu", copy=True)


_ends_to_host.register_fake(lambda ends: torch.empty(ends.shape, dtype=ends.dtype, device="cpu"))


def ends_to_host(*ends: Tensor) -> tuple[Tensor, ...]:
    """Each int64 tensor in host memory, where GEMMs read their sizes. On CUDA one copy for all of them waits for the device;
    turning the results into lists then waits no more.

    It is one explicit op for each selection, whose result every GEMM takes as an argument and autograd saves like any other
    input. Caching the ends on a tensor would be wrong: inductor reuses the memory of one component's ends for the next one's,
    under the same Python object and unnoticed by autograd's version counter.
    """
    if ends[0].is_cpu and is_eager_inference():
        return ends
    together = ends[0] if len(ends) == 1 else torch.cat(ends)
    return torch.split(_ends_to_host(together), [part.shape[0] for part in ends])


def same_choice(indices_TK: Tensor, sub_dims: int, shared: int, size: int) -> Tensor:
    """Tiles of `size` tokens with the same active sub-dimensions: int64 [M, size], padded with -1.

    M = T // size + min(T, number of possible choices) follows from shapes alone.
    """
    tokens, active = indices_TK.shape
    keys = _choice_keys(indices_TK[:, shared:], sub_dims)
    order = torch.arange(tokens, device=indices_TK.device)
    for key in reversed(keys):  # stable sorts, the least significant key first
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
    """Keys, int64 [T] each, that together identify a choice: as many as needed for none to overflow (256 to the 8th is 2^64)."""
    digits = max(1, int(62 // math.log2(max(2, sub_dims))))
    keys = []
    for start in range(0, chosen_TP.shape[1], digits):
        key = chosen_TP[:, start]
        for k in range(start + 1, min(start + digits, chosen_TP.shape[1])):
            key = key * sub_dims + chosen_TP[:, k]
        keys.append(key)
    return keys


def tiles(pairs: Tensor, ends: Tensor, size: int = TILE) -> tuple[Tensor, Tensor]:
    """Pairs in tiles of one run each: ([M, size] of `pairs`, padded with -1; [M] the run of each tile).

    M = len(pairs) // size + len(ends) follows from shapes, since each run wastes less than a tile. Empty tiles belong to the
    last run.
    """
    count = pairs.shape[0] // size + ends.shape[0]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tile_ends = ((ends - starts + size - 1) // size).cumsum(0)
    tile_starts = torch.cat([ends.new_zeros(1), tile_ends[:-1]])
    run = torch.searchsorted(tile_ends, torch.arange(count, device=pairs.device), right=True)
    run = run.clamp(max=ends.shape[0] - 1)
    first = starts[run] + (torch.arange(count, device=pairs.device) - tile_starts[run]) * size
    position = first.unsqueeze(1) + torch.arange(size, device=pairs.device)
    inside = position < ends[run].unsqueeze(1)
    return torch.where(inside, pairs[position.clamp(max=pairs.shape[0] - 1)], -1), run
