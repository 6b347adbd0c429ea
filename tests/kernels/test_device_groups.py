"""The GEMMs over groups whose sizes stay on the device, with a stand-in for torch's grouped product, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.routing import choose, component, operands
from torch import Tensor

from mohd_train.kernels import device_groups


def product(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """What `torch._grouped_mm` documents, with garbage for an empty group of a weight gradient."""
    assert offs.dtype == torch.int32
    for operand in (a, b):
        assert 1 in operand.stride()[-2:] or 1 in operand.shape
    bounds = [0, *offs.tolist()]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    if b.dim() == 3:
        return torch.cat([a[rows] @ b[i] for i, rows in enumerate(spans)])
    parts = [a[:, rows] @ b[rows] for rows in spans]
    return torch.stack([part * (float("nan") if rows.stop == rows.start else 1) for part, rows in zip(parts, spans)])  # noqa: B905


@pytest.mark.parametrize(("tokens", "n", "k", "s"), [(37, 8, 4, 3), (3, 16, 4, 3), (9, 5, 1, 0), (6, 4, 4, 3)])
def test_equals_the_reference(tokens: int, n: int, k: int, s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(device_groups, "serves", lambda x, chosen, width: calls.append(chosen) or chosen == 1)
    monkeypatch.setattr(device_groups, "_product", lambda: product)
    indices = choose(tokens, n, k, s)
    inputs = operands(indices, n, 4)
    got, want = (component(backend, indices, n, s, inputs) for backend in ("grouped", "reference"))
    slope = torch.randn_like(want)
    gots = [got, *torch.autograd.grad(got, list(inputs.values()), slope)]
    wants = [want, *torch.autograd.grad(want, list(inputs.values()), slope)]
    for a, b in zip(gots, wants, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-10
    assert len(calls) == 12  # six products and their gradients


def test_serves_no_cpu() -> None:
    assert not device_groups.serves(torch.zeros(2, 2, dtype=torch.bfloat16), 1, 64)
