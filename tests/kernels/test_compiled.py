"""Compiled by inductor, whose buffers are handed from one component to the next: results stay those of the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support.routing import choose, operands
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch.utils.checkpoint import checkpoint

from mohd_train.kernels import ops

pytestmark = pytest.mark.skipif(not cpu_vec_isa.pick_vec_isa(), reason="no compiler for the generated code")

LAYERS = 2


def pointwise_searchsorted(keys: Tensor, values: Tensor, right: bool = False) -> Tensor:
    """`torch.searchsorted` of one sorted row as a sum, which inductor generates on a CPU too, into a buffer of its own."""
    assert right
    assert keys.dim() == 1
    return (keys[None, :] <= values[:, None]).sum(1)


def layers(
    backend: str, indices: list[Tensor], n: int, s: int, inputs: list[dict[str, Tensor]], kept: bool = True
) -> Tensor:
    """Components one after the other, each with a choice of its own, with or without checkpoints of their inputs."""
    x = inputs[0]["x"]
    for chosen, values in zip(indices, inputs, strict=True):
        run: Callable[[Tensor], Tensor] = functools.partial(_layer, backend, chosen, n, s, values)
        x = run(x) if kept else checkpoint(run, x, use_reentrant=False)
    return x


def _layer(backend: str, chosen: Tensor, n: int, s: int, values: dict[str, Tensor], x: Tensor) -> Tensor:
    # The choice is worked out where the layer runs, as a router's is: its group ends are then a buffer like any other
    chosen = chosen + (x.sum() != x.sum()).long()
    selection = ops.make_selection(chosen, sub_dims=n, shared=s, backend=backend)
    (q,) = ops.up_projection(x, (values["q"],), selection, backend=backend)
    z = ops.down_projection(torch.tanh(q), values["o"], selection, values["weights"], backend=backend)
    return ops.fuse_residual(z, None, selection, x, backend=backend)


@pytest.mark.parametrize(
    ("n", "k", "s", "way"),
    [
        (8, 4, 3, "recomputed"),
        (16, 12, 9, "recomputed"),
        (13, 6, 1, "recomputed"),
        (16, 12, 9, "kept"),
        (8, 4, 3, "no gradients"),
        (16, 12, 9, "full width"),
    ],
)
def test_several_layers_with_group_ends_in_reused_buffers(
    n: int, k: int, s: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sub-dimension chosen, three, and too many choices to sort by. Without gradients, or where a layer is recomputed, a
    layer's group ends lie in memory that held those of another."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "searchsorted", pointwise_searchsorted)
    if way == "full width":  # the path of a GPU, which has no group ends
        monkeypatch.setattr(ops, "choose_path", lambda *_: "masked")
    indices = [choose(37, n, k, s) for _ in range(LAYERS)]
    inputs = [operands(chosen, n, 4) for chosen in indices]
    leaves = [inputs[0]["x"], *(values[name] for values in inputs for name in ("q", "o", "weights"))]
    want = layers("reference", indices, n, s, inputs)
    run = torch.compile(layers, fullgraph=True, dynamic=False)
    with torch.set_grad_enabled(way != "no gradients"):
        got = run("grouped", indices, n, s, inputs, way != "recomputed")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    if way != "no gradients":
        slope = torch.randn_like(want)
        gots, wants = (torch.autograd.grad(out, leaves, slope) for out in (got, want))
        torch.testing.assert_close(gots, wants, rtol=1e-9, atol=1e-9)


def test_backward_passes_ignore_autocast_when_compiled() -> None:
    """The compiler traces them in the forward pass's autocast region, eager autograd runs them outside of it."""
    torch.manual_seed(0)
    values = {"x": torch.randn(24, 40), "norm_weight": torch.randn(40), "centroids": torch.randn(5, 40)}
    values |= {"z": torch.randn(24, 16), "mixing": torch.randn(8, 5, 5)}
    indices = torch.stack([torch.zeros(24, dtype=torch.int64), torch.arange(24) % 4 + 1], 1)

    def run(x: Tensor, norm_weight: Tensor, centroids: Tensor, z: Tensor, mixing: Tensor) -> tuple[Tensor, ...]:
        normed, logits, _ = ops.norm_router(x, norm_weight, centroids, 1e-6, backend="grouped")
        selection = ops.make_selection(indices, sub_dims=5, shared=1, backend="grouped")
        return normed, logits, ops.fuse_residual(z, mixing, selection, x, backend="grouped")

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = [value.clone().requires_grad_() for value in values.values()]
        with torch.autocast("cpu", torch.bfloat16):
            outs = function(*inputs)
        found.append(torch.autograd.grad(outs, inputs, [torch.ones_like(out) for out in outs]))
    for name, eager, compiled in zip(values, *found, strict=True):
        assert eager.abs().sum() > 0
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
