"""Active inputs recomputed in the backward pass: the same gradients, and no copy of them is kept."""

from __future__ import annotations

import re

import pytest
import torch
from support.routing import choose
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch._inductor.utils import run_and_get_code

from mohd_train.kernels import ops

N, C, F = 8, 3, 10
EPS = 1e-5


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "x": (tokens, N * C), "norm_weight": (N * C,), "centroids": (N, N * C), "q": (F, N * C), "k": (F + 2, N * C),
        "gate": (F, N * C), "up": (F, N * C), "down": (N * C, F),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def forward(v: dict[str, Tensor], indices: Tensor, shared: int, backend: str, gated: bool = False) -> list[Tensor]:
    """Everything that reads the norm, down to outputs that its gradient comes from."""
    normed, logits, rstd = ops.norm_router(v["x"], v["norm_weight"], v["centroids"], EPS, backend=backend)
    norm_inputs = ops.NormInputs(v["x"], rstd, v["norm_weight"])
    chosen = ops.make_selection(indices, sub_dims=N, shared=shared, backend=backend)
    weights = logits.softmax(-1).gather(1, indices)
    more = {"norm_inputs": norm_inputs, "backend": backend, "input_weights_TK": weights if gated else None}
    qk = ops.up_projection(normed, (v["q"], v["k"]), chosen, **more)
    z = ops.swiglu_ffn(normed, v["gate"], v["up"], v["down"], chosen, weights, **more)
    return [logits, *qk, z]


@pytest.mark.parametrize(("active", "shared"), [(4, 3), (4, 1), (4, 0), (8, 8)])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_reference(active: int, shared: int, gated: bool) -> None:
    values, indices = inputs(37), choose(37, N, active, shared)
    got, want = (forward(values, indices, shared, backend, gated) for backend in ("grouped", "reference"))
    slopes = [torch.randn_like(part) for part in want]
    got += torch.autograd.grad(got, list(values.values()), slopes)
    want += torch.autograd.grad(want, list(values.values()), slopes)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-10


def test_traced_without_a_graph_break() -> None:
    torch._dynamo.reset()
    values, indices = inputs(37), choose(37, N, 4, 3)
    run = torch.compile(forward, fullgraph=True, backend="aot_eager")
    got, want = run(values, indices, 3, "grouped"), forward(values, indices, 3, "grouped")
    gots, wants = (
        torch.autograd.grad(sum(part.sum() for part in parts), list(values.values())) for parts in (got, want)
    )
    for a, b in zip((*got, *gots), (*want, *wants), strict=True):
        torch.testing.assert_close(a, b)


def test_recomputed_bit_for_bit_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, weight gradients equal those of kept inputs bit for bit, also in blocks of a few rows."""
    monkeypatch.setattr("mohd_train.kernels.fusion.BLOCK_ELEMENTS", 5 * C)
    values, indices = inputs(37, torch.float32), choose(37, N, 4, 3)
    chosen = ops.make_selection(indices, sub_dims=N, shared=3, backend="grouped")

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            normed, _, rstd = ops.norm_router(
                values["x"], values["norm_weight"], values["centroids"], EPS, backend="grouped"
            )
            norm_inputs = ops.NormInputs(values["x"], rstd, values["norm_weight"]) if recompute else None
            q, k = ops.up_projection(
                normed, (values["q"], values["k"]), chosen, norm_inputs=norm_inputs, backend="grouped"
            )
        return torch.autograd.grad(q.sum() + k.sum(), [values["q"], values["k"], values["x"]])

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_no_copy_is_kept() -> None:
    values, indices = inputs(37), choose(37, N, 4, 3)
    own = {value.untyped_storage().data_ptr() for value in values.values()}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        normed, _, rstd = ops.norm_router(
            values["x"], values["norm_weight"], values["centroids"], EPS, backend="grouped"
        )
        norm_inputs = ops.NormInputs(values["x"], rstd, values["norm_weight"])
        chosen = ops.make_selection(indices, sub_dims=N, shared=3, backend="grouped")
        ops.up_projection(normed, (values["q"], values["k"]), chosen, norm_inputs=norm_inputs, backend="grouped")
    assert set(kept) == {(37,)}  # 1 / rms(x) alone


@pytest.mark.skipif(not cpu_vec_isa.pick_vec_isa(), reason="no compiler, or a processor without vector instructions")
def test_generated_code_moves_whole_rows() -> None:
    """No loop runs through the K*C places of a token one by one, as with an index that has to be divided by C."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    tokens, width, active = 40, 16, 6
    indices, slope = choose(tokens, N, active, 1), torch.randn(tokens, active * width)
    shapes = ((tokens, N * width), (N * width,), (5, N * width), (N * width, 5), (tokens, active))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def run(x: Tensor, norm_weight: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        rstd = (x.square().mean(-1) + EPS).rsqrt().detach()
        chosen = ops.make_selection(indices, sub_dims=N, shared=1, backend="grouped")
        norm_inputs = ops.NormInputs(x, rstd, norm_weight)
        (h,) = ops.up_projection(
            x * rstd[:, None] * norm_weight, (up,), chosen, norm_inputs=norm_inputs, backend="grouped"
        )
        return ops.down_projection(h, down, chosen, weights, backend="grouped")

    wants = torch.autograd.grad(run(*inputs), inputs, slope)
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    gots, codes = run_and_get_code(lambda: torch.autograd.grad(compiled(*inputs), inputs, slope))
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(codes) == 2  # forward, backward
    assert all("mohd.up_sorted" in code for code in codes)
    one_by_one = re.compile(rf"x\d<static_cast<int64_t>\({active * width}L\); x\d\+=static_cast<int64_t>\(1L\)")
    assert not [match for code in codes for match in one_by_one.findall(code)]
