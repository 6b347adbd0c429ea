"""Run by test_triton.py with TRITON_INTERPRET=1: the triton backend against the reference, float32, outputs and gradients."""

from __future__ import annotations

import torch
from support.dispatch import host_syncs
from support.routing import choose, component, operands

from mohd_train.kernels import ops
from mohd_train.kernels.triton import gemm

ops.TRITON_TILES = (16, 16)
SPLIT = "parts of the tokens, and a sub-dimension that none chose"
CASES = {  # tokens, N, K, S, C
    "one slice": (19, 5, 3, 2, 16),
    "several slices, odd width": (18, 5, 4, 2, 24),
    "one token, none shared": (1, 3, 1, 0, 16),
    "shared only": (5, 3, 2, 2, 16),
    SPLIT: (19, 4, 3, 2, 24),
}

for name, (tokens, n, k, s, c) in CASES.items():
    torch.manual_seed(0)
    indices = choose(tokens, n, k, s)
    if name == SPLIT:
        n, gemm.LEAST_TOKENS = n + 1, 5
        assert gemm.token_parts(tokens, s, c, [10, 6, 0]) == 3
    inputs = operands(indices, n, c, torch.float32)
    exact = {key: value.detach().double().requires_grad_() for key, value in inputs.items()}
    assert ops.resolve_backend("triton", torch.device("cpu"), torch.float32, width=c) == "triton"
    run = (
        torch.compile(component, fullgraph=True, backend="aot_eager")
        if name == "several slices, odd width"
        else component
    )
    got, want = run("triton", indices, n, s, inputs), component("reference", indices, n, s, exact)
    slope = torch.randn_like(got)
    if run is component:
        with host_syncs() as seen:
            torch.autograd.grad(run("triton", indices, n, s, inputs), list(inputs.values()), slope)
        assert seen.waits == {}, name
        assert seen.lists == seen.counts["ends_to_host"] == 0, name
    gots = [got, *torch.autograd.grad(got, list(inputs.values()), slope)]
    wants = [want, *torch.autograd.grad(want, list(exact.values()), slope.double())]
    for key, a, b in zip(("out", *inputs), gots, wants, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-20)
        assert error < 2e-6, f"{name}: {key} differs by {error:.1e}"  # sums of some ten float32 terms, six ops deep
    print(name, "agrees", flush=True)

torch.manual_seed(0)
values = {"x": torch.randn(21, 40), "norm_weight": torch.randn(40), "centroids": torch.randn(5, 40)}
inputs = {key: value.requires_grad_() for key, value in values.items()}
exact = {key: value.detach().double().requires_grad_() for key, value in values.items()}
*gots, rstd = ops.norm_router(*inputs.values(), 1e-6, backend="triton")
*wants, wanted = ops.norm_router(*exact.values(), 1e-6, backend="reference")
assert not rstd.requires_grad
torch.testing.assert_close(rstd.double(), wanted)
slopes = [torch.randn_like(part) for part in gots]
gots += torch.autograd.grad(gots, list(inputs.values()), slopes)
wants += torch.autograd.grad(wants, list(exact.values()), [slope.double() for slope in slopes])
for key, a, b in zip(("normed", "logits", *inputs), gots, wants, strict=True):
    error = (a.double() - b).norm() / b.norm()
    assert error < 2e-6, f"norm and router: {key} differs by {error:.1e}"
print("norm and router agrees")
