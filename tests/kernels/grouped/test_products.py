"""The grouped backend against the reference: outputs and every gradient, eager and traced, float64 to 1e-10."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.routing import choose, component, operands
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mohd_train.kernels import ops
from mohd_train.kernels.selection import choose_path

SHAPES = [  # tokens, N, K, S, C
    pytest.param(37, 8, 4, 3, 4, id="x2"),
    pytest.param(32, 16, 12, 9, 2, id="75"),
    pytest.param(33, 16, 4, 3, 3, id="x4-odd"),
    pytest.param(5, 8, 4, 0, 2, id="specialized-only"),
    pytest.param(1, 8, 4, 3, 2, id="one-token"),
    pytest.param(9, 4, 4, 4, 2, id="shared-only"),
    pytest.param(9, 4, 4, 3, 2, id="all-active"),
    pytest.param(21, 13, 6, 1, 2, id="too-many-choices-to-sort-by"),
    pytest.param(19, 48, 24, 12, 2, id="many-narrow"),
]


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def compare(
    run: Callable[..., Tensor], indices: Tensor, n: int, s: int, inputs: dict[str, Tensor], gate: bool = False
) -> None:
    """`run("grouped", ...)` equals the reference in its output and in the gradient of every input."""
    want = component("reference", indices, n, s, inputs, gate)
    got = run("grouped", indices, n, s, inputs, gate)
    slope = torch.randn_like(want)
    assert relative(got, want) < 1e-10
    wants = torch.autograd.grad(want, list(inputs.values()), slope, allow_unused=True)
    gots = torch.autograd.grad(got, list(inputs.values()), slope, allow_unused=True)
    for name, a, b in zip(inputs, gots, wants, strict=True):
        assert a is not None, name
        assert b is not None, name
        assert a.shape == b.shape
        assert relative(a, b) < 1e-10, name


@pytest.mark.parametrize(("tokens", "n", "k", "s", "c"), SHAPES)
@pytest.mark.parametrize("gate", [False, True])
def test_equals_the_reference(tokens: int, n: int, k: int, s: int, c: int, gate: bool) -> None:
    indices = choose(tokens, n, k, s)
    compare(component, indices, n, s, operands(indices, n, c), gate)


@pytest.mark.parametrize(("tokens", "n", "k", "s", "c"), SHAPES)
@pytest.mark.parametrize("gate", [False, True])
def test_over_the_full_width(
    tokens: int, n: int, k: int, s: int, c: int, gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU where a token uses half of the sub-dimensions or more; it is right for any."""
    monkeypatch.setattr("mohd_train.kernels.ops.choose_path", lambda *_: "masked")
    indices = choose(tokens, n, k, s)
    compare(component, indices, n, s, operands(indices, n, c), gate)


def test_the_path_follows_from_device_and_sizes_alone() -> None:
    def path(device: str, n: int, k: int, s: int, backend: str = "grouped") -> str:
        return choose_path(backend, device, 1000, n, k, s)

    assert [path("cpu", *sizes) for sizes in ((8, 4, 3), (16, 12, 9), (16, 4, 3))] == ["sorted_spans"] * 3
    assert [path("cuda", *sizes) for sizes in ((8, 4, 3), (16, 12, 9), (16, 4, 3))] == ["masked"] * 2 + ["sorted_spans"]
    assert path("cpu", 32, 16, 12) == "gathered_runs"
    assert [path(device, 256, 128, 96) for device in ("cpu", "cuda")] == ["masked"] * 2
    assert path("cuda", 256, 4, 1) == "gathered_runs"  # a mixture of many experts: 64 times the arithmetic
    assert path("cuda", 8, 4, 3, "triton") == "triton"


@pytest.mark.parametrize(("tokens", "n", "k", "s", "c"), [SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[8]])
def test_traced_without_a_graph_break(tokens: int, n: int, k: int, s: int, c: int) -> None:
    torch._dynamo.reset()
    indices = choose(tokens, n, k, s)
    run = torch.compile(component, fullgraph=True, backend="aot_eager", dynamic=False)
    compare(run, indices, n, s, operands(indices, n, c))


def test_traced_for_another_number_of_tokens_and_under_autocast() -> None:
    torch._dynamo.reset()
    run = torch.compile(component, fullgraph=True, backend="aot_eager")
    for tokens in (37, 50):  # the second is traced with a symbolic size
        indices = choose(tokens, 8, 4, 3)
        compare(run, indices, 8, 3, operands(indices, 8, 4))
    inputs = operands(indices, 8, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (one("grouped", indices, 8, 3, inputs) for one in (run, component))
    assert relative(got, want) < 1e-5


def test_every_token_in_one_group_and_the_others_empty() -> None:
    indices = torch.cat([torch.arange(3).expand(40, 3), torch.full((40, 1), 6)], 1)
    inputs = operands(indices, 8, 4)
    compare(component, indices, 8, 3, inputs)
    component("grouped", indices, 8, 3, inputs).sum().backward()
    for name in ("q", "k", "gate", "up", "down", "o"):
        grad = inputs[name].grad
        assert grad is not None
        slices = (grad if name in ("down", "o") else grad.T).unflatten(0, (8, 4))
        assert (slices[[3, 4, 5, 7]] == 0).all(), name
        assert (slices[[0, 1, 2, 6]] != 0).any(-1).all(), name


@pytest.mark.parametrize("pages", [1, 1 << 20])
def test_wide_slices(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mohd_train.kernels.grouped.gathered_runs.NARROW", 0)
    monkeypatch.setattr("mohd_train.kernels.grouped.sorted_spans.NARROW_OUTPUT", 0)
    monkeypatch.setattr("mohd_train.kernels.grouped.sorted_spans.PAGES", pages)
    for tokens, n, k, s in ((37, 16, 12, 9), (21, 13, 6, 1), (5, 16, 12, 9)):
        indices = choose(tokens, n, k, s)
        compare(component, indices, n, s, operands(indices, n, 4))


def test_blocks_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mohd_train.kernels.fusion.BLOCK_ELEMENTS", 5 * 32)
    indices = choose(37, 8, 4, 3)
    compare(component, indices, 8, 3, operands(indices, 8, 4))


def test_non_contiguous_inputs() -> None:
    indices = choose(12, 8, 4, 3)
    inputs = operands(indices, 8, 4)
    strided = {name: value.detach().t().contiguous().t() for name, value in inputs.items() if value.dim() == 2}
    inputs = {name: strided.get(name, value.detach()).requires_grad_() for name, value in inputs.items()}
    assert not inputs["x"].is_contiguous()
    wide = indices.new_empty(12, 8)[:, ::2].copy_(indices)
    compare(component, wide, 8, 3, inputs)


def test_gradients_accumulate() -> None:
    indices = choose(12, 8, 4, 3)
    inputs = operands(indices, 8, 4)
    want = torch.autograd.grad(component("reference", indices, 8, 3, inputs).sum(), list(inputs.values()))
    for _ in range(2):
        component("grouped", indices, 8, 3, inputs).sum().backward()
    for value, grad in zip(inputs.values(), want, strict=True):
        assert value.grad is not None
        assert relative(value.grad, 2 * grad) < 1e-10


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    indices = choose(12, 8, 4, 3)
    inputs = operands(indices, 8, 4)
    want = torch.autograd.grad(component("reference", indices, 8, 3, inputs).sum(), list(inputs.values()))

    def run(*values: Tensor) -> Tensor:
        return component("grouped", indices, 8, 3, dict(zip(inputs, values, strict=True)))

    checkpoint(run, *inputs.values(), use_reentrant=reentrant).sum().backward()
    for value, grad in zip(inputs.values(), want, strict=True):
        assert value.grad is not None
        assert relative(value.grad, grad) < 1e-10


def test_bit_for_bit_from_run_to_run() -> None:
    indices = choose(200, 16, 12, 9)
    inputs = operands(indices, 16, 4, torch.float32)

    def once() -> list[Tensor]:
        out = component("grouped", indices, 16, 9, inputs)
        return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize(("n", "k", "s"), [(8, 4, 3), (16, 12, 9), (13, 6, 1), (5, 1, 0), (4, 4, 4)])
def test_without_gradients_the_same_output(tokens: int, n: int, k: int, s: int) -> None:
    """Up to 16 tokens take the path `few_tokens`."""
    indices = choose(tokens, n, k, s)
    inputs = operands(indices, n, 4)
    with torch.no_grad():
        plain = component("grouped", indices, n, s, inputs)
        assert (ops.make_selection(indices, sub_dims=n, shared=s, backend="grouped").choices is None) == (tokens == 40)
    assert relative(plain, component("reference", indices, n, s, inputs)) < 1e-10


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
def test_lower_precision_errs_as_little_as_the_reference(dtype: torch.dtype, unit: float) -> None:
    """Sums are accumulated in float32 and every op rounds its result once: the error against float64 is a few units of
    rounding, and not more than twice the reference's own in the same dtype (which splits the sums less) plus four units."""
    indices = choose(64, 8, 4, 3)
    exact = operands(indices, 8, 16)
    rounded = {name: value.detach().to(dtype).requires_grad_() for name, value in exact.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in rounded.items()}

    def both(backend: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        out = component(backend, indices, 8, 3, inputs)
        return [out, *torch.autograd.grad(out.double().square().mean(), list(inputs.values()))]

    truth, got, reference = both("reference", exact), both("grouped", rounded), both("reference", rounded)
    for name, a, b, c in zip(("out", *exact), got, reference, truth, strict=True):
        error, own = ((value.double() - c).norm() / c.norm() for value in (a, b))
        assert error <= 2 * own + 4 * unit, name
        assert a.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_autocast_multiplies_in_bfloat16_and_keeps_the_residual_in_float32(backend: str) -> None:
    indices = choose(64, 8, 4, 3)
    inputs = operands(indices, 8, 16, torch.float32)
    selection = ops.make_selection(indices, sub_dims=8, shared=3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        (q,) = ops.up_projection(inputs["x"], (inputs["q"],), selection, backend=backend)
        z = ops.down_projection(q, inputs["o"], selection, inputs["weights"], backend=backend)
        out = ops.fuse_residual(z, inputs["mixing"], selection, inputs["residual"], backend=backend)
    assert (q.dtype, z.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    out.sum().backward()
    for name in ("x", "q", "o", "weights", "mixing", "residual"):
        grad = inputs[name].grad
        assert grad is not None
        assert grad.dtype == torch.float32
