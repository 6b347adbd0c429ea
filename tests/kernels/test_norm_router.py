"""RMSNorm with the router's logits: the op that keeps x and 1 / rms(x) alone equals the plain one, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.kernels import ops

EPS = 1e-5


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((13, 24), (24,), (6, 24))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("traced", [False, True])
def test_equals_the_reference(traced: bool) -> None:
    torch._dynamo.reset()
    run = torch.compile(ops.norm_router, fullgraph=True, backend="aot_eager") if traced else ops.norm_router
    values = inputs()
    *got, rstd = run(*values, EPS, backend="grouped")
    *want, wanted = ops.norm_router(*values, EPS, backend="reference")
    assert not rstd.requires_grad
    torch.testing.assert_close(rstd, wanted)
    slopes = [torch.randn_like(part) for part in want]
    got += torch.autograd.grad(got, values, slopes)
    want += torch.autograd.grad(want, values, slopes)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_is_rms_norm_and_a_product(backend: str) -> None:
    x, gain, centroids = inputs()
    normed, logits, rstd = ops.norm_router(x, gain, centroids, EPS, backend=backend)
    torch.testing.assert_close(rstd, (x.square().mean(-1) + EPS).rsqrt())
    want = F.rms_norm(x, gain.shape, gain, EPS)
    torch.testing.assert_close(normed, want)
    torch.testing.assert_close(logits, want @ centroids.t())


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_logits_stay_in_float32_under_autocast(backend: str) -> None:
    x, gain, centroids = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        normed, logits, _ = ops.norm_router(x.bfloat16(), gain, centroids, EPS, backend=backend)
    assert (normed.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    exact = ops.norm_router(x.bfloat16().float(), gain, centroids, EPS, backend="reference")[1]
    torch.testing.assert_close(logits, exact)


def test_keeps_no_normalized_copy() -> None:
    x, gain, centroids = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.norm_router(x, gain, centroids, EPS, backend="grouped")
    assert [tensor.data_ptr() for tensor in kept if tensor.shape == x.shape] == [x.data_ptr()]
