"""Autocast: what several weights read is cast once, and what a cast would spoil is computed before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.plans import small_plan
from support.routing import choose
from torch.utils._python_dispatch import TorchDispatchMode

from mohd_train.kernels import ops
from mohd_train.model.llama import Transformer


class Casts(TorchDispatchMode):
    """Counts the casts from float32 to bfloat16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, out.dtype) == (torch.float32, torch.bfloat16):
            self.shapes[tuple(out.shape)] += 1
        return out


@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("setting", ["dense", "50", "75", "x2", "x4"])
def test_a_layer_casts_its_inputs_once(setting: str, backend: str) -> None:
    """q, k, v read one cast of the norm's output, gate and up another, the head a third; the compact inputs are gathered from
    those. The scaled output of each component is a cast of its own."""
    batch, positions = 2, 21
    model = Transformer(small_plan(setting, model={"num_hidden_layers": 1}), kernels=backend, seed=0)
    ids = torch.randint(97, (batch, positions))
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        model(ids, logits=False, labels_BT=ids)
    tokens, d = batch * positions, model.plan.hidden_size
    full = casts.shapes[tokens, d] + casts.shapes[batch, positions, d]
    part = model.plan.attention
    compact = 0 if part is None else casts.shapes[tokens, part.top_k, d // part.sub_dims]
    assert (full, compact) == ((3, 0) if part is None else (3, 2))


def test_a_mixture_of_experts_casts_its_input_once() -> None:
    x, gate, up, down = (torch.randn(size) for size in ((9, 6), (16, 6), (16, 6), (6, 16)))
    selection = ops.make_selection(choose(9, 8, 4, 1), sub_dims=8, shared=1, backend="grouped")
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        ops.expert_ffn(x, gate, up, down, selection, torch.rand(9, 4), backend="grouped")
    assert casts.shapes[tuple(x.shape)] == 1


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_the_router_reads_the_norm_before_it_is_rounded(backend: str) -> None:
    x, weight, centroids = torch.randn(12, 16), torch.rand(16), torch.randn(8, 16)
    exact_TD, exact_TN, _ = ops.norm_router(x, weight, centroids, 1e-5, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        normed_TD, logits_TN, _ = ops.norm_router(x, weight, centroids, 1e-5, backend=backend)
    assert normed_TD.dtype == torch.bfloat16
    assert torch.equal(normed_TD, exact_TD.bfloat16())
    assert torch.equal(logits_TN, exact_TN)
