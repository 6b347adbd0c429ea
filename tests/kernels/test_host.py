"""Group ends are read by the host once a selection, and again when they change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.routing import choose, component, operands
from torch import Tensor

from mohd_train.kernels import host


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each reading."""
    readings: list[int] = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> list[int]:
        readings.append(1)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return readings


@pytest.mark.parametrize(("n", "k", "s"), [(8, 4, 3), (16, 12, 9), (13, 6, 1)], ids=["one", "three", "not sorted"])
def test_a_step_reads_the_ends_once(n: int, k: int, s: int, read: list[int]) -> None:
    """Seven products and their backward passes, and the fusion."""
    indices = choose(20, n, k, s)
    component("grouped", indices, n, s, operands(indices, n, 4)).sum().backward()
    assert 1 <= len(read) <= 2  # by choice for the products, by sub-dimension for the fusion


def test_a_compiled_step_reads_them_once_a_pass(read: list[int]) -> None:
    torch._dynamo.reset()
    indices = choose(20, 16, 12, 9)
    run = torch.compile(component, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        read.clear()
        run("grouped", indices, 16, 9, operands(indices, 16, 4)).sum().backward()
    assert 1 <= len(read) <= 2


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_another_selection_is_read_anew(way: Callable[[], torch.no_grad]) -> None:
    with way():
        for _ in range(3):
            indices = choose(40, 8, 4, 3)
            inputs = operands(indices, 8, 4)
            got, want = (component(backend, indices, 8, 3, inputs) for backend in ("grouped", "reference"))
            torch.testing.assert_close(got, want)


def test_ends_that_were_written_to_are_read_anew() -> None:
    ends = torch.tensor([1, 2])
    assert host.ends_on_host(ends) == [1, 2]
    ends.copy_(torch.tensor([3, 4]))
    assert host.ends_on_host(ends) == [3, 4]
