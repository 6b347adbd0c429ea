"""Deterministic mode: no write of a step becomes a sort, and the host waits once a selection (`grouped`) or never (`triton`)."""

from __future__ import annotations

import pytest
import torch
from support.dispatch import HostSyncs, host_syncs
from support.plans import small_plan
from support.routing import choose, component, operands

from mohd_train.kernels import loss, ops
from mohd_train.kernels.grouped import token_order
from mohd_train.model.llama import Transformer

SIZES = [(8, 4, 3), (16, 12, 9), (13, 6, 1), (4, 4, 4)]


@pytest.mark.parametrize(("n", "k", "s"), SIZES, ids=["one chosen", "three", "too many choices to sort by", "none"])
def test_a_component_reads_the_ends_once(n: int, k: int, s: int) -> None:
    """Seven products, their gradients, and the fusion."""
    indices = choose(20, n, k, s)
    with host_syncs() as seen:
        component("grouped", indices, n, s, operands(indices, n, 4)).sum().backward()
    assert seen.waits == {}
    assert seen.counts["ends_to_host"] == 1
    assert seen.lists > 0
    assert seen.foreign == 0


def test_many_narrow_sub_dimensions_take_a_few_large_products_and_no_read() -> None:
    """Fig. 12b goes to N = 256, where a product for each sub-dimension would be thousands of launches a layer."""
    calls = {}
    for n in (16, 64, 256):
        indices = choose(40, n, n // 2, 3 * n // 8)
        with host_syncs() as seen:
            component("grouped", indices, n, 3 * n // 8, operands(indices, n, 2)).sum().backward()
        assert seen.waits == {}
        assert seen.counts["ends_to_host"] == (n == 16)
        calls[n] = sum(seen.counts.values())
    assert calls[256] == calls[64] < calls[16]


@pytest.mark.parametrize(("n", "k", "s"), [*SIZES, (32, 16, 0)])
def test_a_selection_for_triton_reads_nothing(n: int, k: int, s: int) -> None:
    with host_syncs() as seen:
        ops.make_selection(choose(200, n, k, s), sub_dims=n, shared=s, backend="triton")
    assert seen.waits == {}
    assert seen.counts["ends_to_host"] == seen.lists == 0


def test_constants_go_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_order, "_UPLOADED", {})
    uploads = []
    for _ in range(2):
        with host_syncs() as seen:
            ops.make_selection(choose(20, 16, 12, 9), sub_dims=16, shared=9, backend="grouped")
        uploads.append(seen.uploads)
    assert uploads == [2, 0]


def test_the_loss_scatters_nothing() -> None:
    hidden, head = (torch.randn(size, requires_grad=True) for size in ((12, 5), (31, 5)))
    with host_syncs() as seen:
        loss.linear_cross_entropy(hidden, head, torch.randint(31, (12,)), chunk_tokens=5).backward()
    assert seen.waits == {}


def step(model: Transformer) -> HostSyncs:
    ids = torch.randint(97, (2, 24))
    with host_syncs() as seen:
        out = model(ids, labels_BT=ids, logits=False)
        (out.cross_entropy + out.balance_loss).backward()
    return seen


@pytest.mark.parametrize("setting", ["50", "75", "x2"])
def test_a_whole_step_reads_the_ends_once_a_selection(setting: str) -> None:
    model = Transformer(small_plan(setting), kernels="grouped", seed=0)
    step(model)  # uploads constants
    seen = step(model)
    assert seen.waits == {}
    assert seen.uploads == 0
    assert seen.counts["ends_to_host"] == 2 * len(model.blocks)
    assert seen.foreign == 0


def test_over_the_full_width_a_step_waits_for_nothing_and_takes_far_fewer_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path of a GPU for 50%, 75% and x2, which small products and the waits for their sizes would slow down."""
    model = Transformer(small_plan("75"), kernels="grouped", seed=0)
    by_runs = sum(step(model).counts.values())
    monkeypatch.setattr("mohd_train.kernels.ops.choose_path", lambda *_: "masked")
    seen = step(model)
    assert seen.waits == {}
    assert seen.uploads == seen.counts["ends_to_host"] == seen.lists == 0
    assert sum(seen.counts.values()) < by_runs / 5
