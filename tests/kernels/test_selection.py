"""What a selection derives from a router's choice: runs, and tiles of pairs and of tokens."""

from __future__ import annotations

import pytest
import torch
from support.routing import choose

from mohd_train.kernels.selection import TILE, same_choice, select, tiles


def test_runs_are_sorted_by_sub_dimension_then_token() -> None:
    indices = choose(50, 16, 12, 9)
    selection = select(indices, 16, 9, "gathered_runs")
    ids = indices.reshape(-1)[selection.pairs]
    tokens = selection.pairs // 12
    assert (ids[1:] >= ids[:-1]).all()
    assert ((tokens[1:] > tokens[:-1]) | (ids[1:] > ids[:-1])).all()
    assert selection.ends.tolist() == [(ids <= i).sum().item() for i in range(9, 16)]
    assert (selection.slots_TN.gather(1, indices) == torch.arange(12)).all()
    assert ((selection.slots_TN >= 0).sum(1) == 12).all()


@pytest.mark.parametrize("tokens", [1, TILE, 100])
def test_a_tile_holds_one_sub_dimension_and_all_tiles_hold_every_pair_once(tokens: int) -> None:
    indices = choose(tokens, 12, 4, 2)
    selection = select(indices, 12, 2, "gathered_runs")
    tile_pairs, runs = tiles(selection.pairs, selection.ends)
    kept = tile_pairs >= 0
    assert torch.equal(tile_pairs[kept], selection.pairs)
    ids = indices.reshape(-1)[tile_pairs.clamp(min=0)]
    assert (ids == runs.unsqueeze(1) + 2)[kept].all()


@pytest.mark.parametrize(("n", "active", "shared"), [(8, 4, 3), (16, 12, 9), (32, 16, 0), (256, 20, 4)])
def test_a_tile_holds_tokens_of_one_choice(n: int, active: int, shared: int) -> None:
    """Also where a choice as one number is past 2^63: the second choice differs from the first in its first place alone."""
    base = torch.arange(n - active, n)
    choices = torch.stack([base, base, torch.cat([base[:-2] - 1, base[-2:]])])
    choices[1, shared] -= 1
    choices[:, :shared] = torch.arange(shared)
    indices = choices[torch.arange(40) * 7 % 3]
    tiles = same_choice(indices, n, shared, 4)
    for tile in tiles:
        held = indices[tile[tile >= 0]]
        assert (held == held[:1]).all()
    assert torch.equal(tiles[tiles >= 0].sort().values, torch.arange(40))
