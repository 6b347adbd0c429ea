"""The reference backend against the formulas, written once more, token by token."""

import pytest
import torch
import torch.nn.functional as F
from support.routing import choose

from mohd_train.kernels import ops


@pytest.mark.parametrize("gated", [False, True])
def test_projections_token_by_token(gated: bool) -> None:
    indices, width = choose(5, 8, 4, 3), 2
    x, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    weights = torch.rand(5, 4, dtype=torch.float64)
    selection = ops.make_selection(indices, sub_dims=8, shared=3, backend="reference")
    gate = weights if gated else None
    (out,) = ops.up_projection(x, (weight,), selection, input_weights_TK=gate, backend="reference")
    z = ops.down_projection(out, weight.T, selection, weights, backend="reference").view(5, 4, width)
    for t in range(5):
        want = torch.zeros(6, dtype=torch.float64)
        for k, i in enumerate(indices[t].tolist()):
            part = slice(i * width, (i + 1) * width)
            want += weight[:, part] @ x[t, part] * (weights[t, k] if gated else 1)
            torch.testing.assert_close(z[t, k], weights[t, k] * (weight.T[part] @ out[t]))
        torch.testing.assert_close(out[t], want)


def test_fusion_is_a_block_diagonal_matrix_between_two_stride_permutations() -> None:
    n, k, s, c = 8, 4, 3, 2
    indices = choose(5, n, k, s)
    z, blocks = torch.randn(5, k * c, dtype=torch.float64), torch.randn(c, n, n, dtype=torch.float64)
    residual = torch.randn(5, n * c, dtype=torch.float64)
    selection = ops.make_selection(indices, sub_dims=n, shared=s, backend="reference")
    out = ops.fuse_residual(z, blocks, selection, residual, backend="reference")
    stride = torch.arange(n * c).view(n, c).T.reshape(-1)  # group j: the dims at place j of every sub-dimension
    matrix = torch.block_diag(*blocks)
    wide = ops.fuse_residual(z, None, selection, torch.zeros_like(residual), backend="reference")
    want = torch.empty_like(wide)
    want[:, stride] = wide[:, stride] @ matrix.T
    torch.testing.assert_close(out, residual + want)


def test_all_active_with_identity_fusion_is_the_dense_layer() -> None:
    n, c = 4, 4
    indices = torch.arange(n).expand(7, n)
    x = torch.randn(7, n * c, dtype=torch.float64)
    gate, up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((10, 16), (10, 16), (16, 10)))
    eye = torch.eye(n, dtype=torch.float64).expand(c, n, n)
    for backend in ("reference", "grouped"):
        selection = ops.make_selection(indices, sub_dims=n, shared=3, backend=backend)
        z = ops.swiglu_ffn(x, gate, up, down, selection, torch.ones(7, n, dtype=torch.float64), backend=backend)
        out = ops.fuse_residual(z, eye, selection, x, backend=backend)
        torch.testing.assert_close(out, x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))
