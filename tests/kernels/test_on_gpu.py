"""On a CUDA device: every backend against the float64 reference, outputs and every gradient, and what it costs the host.

Skipped without one. `make test-gpu` runs this file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.routing import choose
from torch import Tensor

from mohd_train.config.load import load_model_plan
from mohd_train.kernels import ops
from mohd_train.kernels.loss import linear_cross_entropy
from mohd_train.model.llama import Transformer
from mohd_train.resources import path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Relative error in norm: float32 sums of some thousand terms in another order; bfloat16: a few roundings of 2^-9 in sequence
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
CASES = {  # tokens, N, K, S, C, inner width
    "x2": (2048, 8, 4, 3, 128, 512),
    "x4, tokens no multiple of a tile": (1999, 16, 4, 3, 64, 320),
    "75%, three of seven chosen": (1024, 16, 12, 9, 64, 192),
    "none shared": (513, 4, 1, 0, 96, 160),
    "all shared": (256, 4, 2, 2, 64, 96),
    "one token": (1, 8, 4, 3, 64, 96),
}


def pick_block_size(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every kernel runs with the block size of this number. Tuning would compile them all: minutes."""
    launch = pytest.importorskip("mohd_train.kernels.triton.launch")

    def pick(kernel: Any, tile: int, run: Callable[[Any], None]) -> Any:
        sizes = kernel.sizes(tile, launch.capability())
        return sizes[min(number, len(sizes) - 1)]

    monkeypatch.setattr(launch, "CHOSEN", {})
    monkeypatch.setattr(launch.Kernel, "fastest", pick)


def operands(tokens: int, n: int, k: int, width: int, inner: int) -> dict[str, Tensor]:
    """Float64 on the GPU: what a component reads, with gradients on."""
    hidden = n * width
    shapes = {"x": (tokens, hidden), "residual": (tokens, hidden), "gate": (inner, hidden), "up": (inner, hidden)}
    shapes |= {"v": (inner // 2, hidden), "down": (hidden, inner)}
    made = {name: torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    made["x"] *= hidden**0.5
    made["mixing"] = torch.randn(n, n, width, dtype=torch.float64) / n**0.5
    made["weights"] = torch.rand(tokens, k, dtype=torch.float64) + 0.5
    return {name: value.cuda().requires_grad_() for name, value in made.items()}


def component(backend: str, indices_TK: Tensor, n: int, shared: int, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Every op once."""
    selection = ops.make_selection(indices_TK, sub_dims=n, shared=shared, backend=backend)
    x, weights, blocks = inputs["x"], inputs["weights"], inputs["mixing"].permute(2, 1, 0)
    gate, up, v = ops.up_projection(x, (inputs["gate"], inputs["up"], inputs["v"]), selection, backend=backend)
    z = ops.down_projection(torch.tanh(gate) * up, inputs["down"], selection, weights, backend=backend)
    y = ops.fuse_residual(z, blocks, selection, inputs["residual"], backend=backend)
    z = ops.swiglu_ffn(x, inputs["gate"], inputs["up"], inputs["down"], selection, weights, backend=backend)
    return v, y, ops.fuse_residual(z, None, selection, inputs["residual"], backend=backend)


def gradients(outs: tuple[Tensor, ...], inputs: dict[str, Tensor], slopes: list[Tensor]) -> list[Tensor]:
    slopes = [slope.to(out.dtype) for slope, out in zip(slopes, outs, strict=True)]
    return list(torch.autograd.grad(outs, list(inputs.values()), slopes))


def check(case: str, backend: str, dtype: torch.dtype, compiled: bool = False) -> None:
    tokens, n, k, shared, width, inner = CASES[case]
    indices = choose(tokens, n, k, shared).cuda()
    rounded = {name: value.detach().to(dtype) for name, value in operands(tokens, n, k, width, inner).items()}
    rounded["weights"] = rounded["weights"].float()  # as the model has them
    inputs = {name: value.clone().requires_grad_() for name, value in rounded.items()}
    exact = {name: value.double().requires_grad_() for name, value in rounded.items()}
    run: Callable[..., tuple[Tensor, ...]] = torch.compile(component, dynamic=False) if compiled else component
    outs, wants = run(backend, indices, n, shared, inputs), component("reference", indices, n, shared, exact)
    slopes = [torch.randn_like(want) for want in wants]
    got = [*outs, *gradients(outs, inputs, slopes)]
    want = [*wants, *gradients(wants, exact, slopes)]
    for name, a, b in zip(("v", "attention", "ffn", *inputs), got, want, strict=True):
        error = ((a.double() - b).norm() / b.norm().clamp(min=1e-20)).item()
        assert error < TOLERANCE[dtype], f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pick_block_size(monkeypatch, 0)
    check(case, backend, dtype)


@pytest.mark.parametrize("case", ["x2", "75%, three of seven chosen"])
def test_runs_equal_the_reference_where_the_full_width_is_taken(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mohd_train.kernels.selection.CUDA_SHARE", 2.0)
    check(case, "grouped", torch.bfloat16)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_compiled_equals_the_reference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pick_block_size(monkeypatch, 0)
    check("x2", backend, torch.bfloat16, compiled=True)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_every_block_size_equals_the_reference(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pick_block_size(monkeypatch, number)
    check("x2", "triton", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_norm_and_router_equal_the_reference(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pick_block_size(monkeypatch, 0)
    values = {"x": torch.randn(999, 1024), "norm_weight": torch.randn(1024), "centroids": torch.randn(16, 1024) / 32}
    values = {name: value.cuda() for name, value in values.items()}
    values["x"] = values["x"].to(dtype)
    inputs = {name: value.clone().requires_grad_() for name, value in values.items()}
    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    *outs, _ = ops.norm_router(*inputs.values(), 1e-6, backend=backend)
    *wants, _ = ops.norm_router(*exact.values(), 1e-6, backend="reference")
    assert outs[1].dtype == torch.float32
    slopes = [torch.randn_like(want) for want in wants]
    got = [*outs, *gradients(tuple(outs), inputs, slopes)]
    want = [*wants, *gradients(tuple(wants), exact, slopes)]
    for name, a, b in zip(("normed", "logits", *inputs), got, want, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < TOLERANCE[dtype], f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_the_host_never_waits_for_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, once the kernels are compiled; `grouped` where it runs over the full width."""
    pick_block_size(monkeypatch, 0)
    tokens, n, k, shared, width, inner = CASES["x2"]
    indices = choose(tokens, n, k, shared).cuda()
    inputs = {name: value.detach().bfloat16() for name, value in operands(tokens, n, k, width, inner).items()}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    for strict in (False, True):
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            outs = component(backend, indices, n, shared, inputs)
            gradients(outs, inputs, [torch.ones_like(out) for out in outs])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", ["grouped", "triton"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["75", "x2"])
def test_a_model_under_autocast_trains_as_on_the_reference(
    name: str, kernels: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of two layers of 355M against the reference's, both under autocast. The choices are random, which they are
    alike for both: a learned router's would differ for some tokens, as its input differs in rounding."""
    pick_block_size(monkeypatch, 0)
    files = [str(path("configs") / "model" / "355m.yaml"), str(path("configs") / "mohd" / f"{name}.yaml")]
    plan = load_model_plan(files, ["model.num_hidden_layers=2", "max_seq_len=512", "mohd.routing=random"])
    with torch.device("cuda"):
        model, exact = Transformer(plan, kernels, seed=0), Transformer(plan, "reference", seed=0)
    ids = torch.randint(0, plan.vocab_size, (4, 512), device="cuda")
    run = torch.compile(model, dynamic=False) if compiled else model
    with torch.autocast("cuda", torch.bfloat16):
        out = run(ids, labels_BT=ids, logits=False)
        want = exact(ids, labels_BT=ids, logits=False)
    torch.testing.assert_close(out.cross_entropy, want.cross_entropy, rtol=5e-4, atol=0)
    out.cross_entropy.backward()
    want.cross_entropy.backward()
    for (label, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        error = ((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-20)).item()
        assert error < 5e-2, f"{label}: gradients differ by {error:.1e}"


def test_the_loss_equals_cross_entropy() -> None:
    """Whichever is installed, Liger's kernel or the chunks; bfloat16 hidden states, float32 sums."""
    hidden, head = torch.randn(3000, 256, device="cuda") / 4, torch.randn(32000, 256, device="cuda") / 16
    labels = torch.randint(0, 32000, (3000,), device="cuda")
    labels[::7] = -100
    inputs = [part.bfloat16().requires_grad_() for part in (hidden, head)]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    got = linear_cross_entropy(*inputs, labels)
    want = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True):
        assert (a.double() - b).norm() / b.norm() < TOLERANCE[torch.bfloat16]
