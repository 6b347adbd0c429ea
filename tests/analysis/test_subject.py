"""What identifies a model under study."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mohd_train.analysis.subject import fingerprint, probed
from mohd_train.config.catalogue import paper_models
from mohd_train.model.llama import Transformer


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 257, 2**24, 2**24 + 1, 32000 * 1024, 32000 * 8192, 2**53 + 1])
def test_probed_indices_reach_from_the_first_to_the_last(count: int) -> None:
    """From 2^24 numbers on, every size of the paper, an index worked out in float32 lay past the end."""
    found = probed(count)
    assert len(found) == len(set(found)) == min(256, count)
    assert found == sorted(found)
    if count:
        assert (found[0], found[-1]) == (0, count - 1) if count > 1 else found == [0]
        gaps = {b - a for a, b in pairwise(found)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_every_parameter_of_the_papers_models_can_be_probed() -> None:
    sizes = set()
    for plan, _ in paper_models():
        with torch.device("meta"):
            sizes |= {parameter.numel() for parameter in Transformer(plan).parameters()}
    assert max(sizes) > 2**24
    for numel in sizes:
        assert probed(numel)[-1] == numel - 1


def test_a_parameter_of_the_papers_size_has_a_fingerprint() -> None:
    """32000 x 8192 numbers, the embedding of 1.13B x4: a gigabyte of addresses, of which 256 pages are touched."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(32000, 8192))

    model = Sparse()
    with torch.no_grad():
        model.weight.view(-1)[torch.tensor(probed(model.weight.numel()))] = 0
        before = fingerprint(model)
        model.weight[-1, -1] = 1
    assert fingerprint(model) != before
