"""The feed-forward layer of the `triton` backend: gate and up share a K-loop, SwiGLU and its gradient are epilogues.

Saved for the backward pass: the inputs, gate and up, and the scaled output z, which the fusion saves anyway.

Shapes: T tokens, D hidden, K active, S shared, C width, F inner width (OUT). `tiles` int64 [M, BM]: see `gemm`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohd_train.kernels.grouped.products import cast_for_autocast
from mohd_train.kernels.selection import Selection
from mohd_train.kernels.triton.gemm import TILE_SIZES, contract_tile, expand, tile_and_block, weight_grads
from mohd_train.kernels.triton.launch import PRECISION, Size, like, tuned
from mohd_train.kernels.triton.projections import compact_like, scale_grad

# Two accumulators, or two more tensors in the epilogue of the gradient, leave room for fewer block sizes
SWIGLU_SIZES = {64: TILE_SIZES[64], 128: (Size({"BN": 64, "BK": 32}, 8, 4), Size({"BN": 64, "BK": 64}, 8, 3))}


@tuned(SWIGLU_SIZES)
@triton.jit
def swiglu_kernel(
    x, w_gate, w_up, gate, up, h, tile_tokens, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gate and up as by `contract_kernel`, in one K-loop that reads x once, and h = silu(gate) * up in its epilogue."""
    tile, block = tile_and_block()
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        cols = block * BN + tl.arange(0, BN)
        g, u = contract_tile(
            x, w_gate, w_up, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o, True,
            K, C, BM, BN, BK, PRECISION,
        )  # fmt: skip
        at, mask = tokens[:, None] * OUT + cols[None, :], (tokens >= 0)[:, None] & (cols < OUT)[None, :]
        tl.store(gate + at, g.to(h.dtype.element_ty), mask=mask)
        tl.store(up + at, u.to(h.dtype.element_ty), mask=mask)
        tl.store(h + at, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=mask)


@tuned(SWIGLU_SIZES)
@triton.jit
def swiglu_grad_kernel(
    x, w, gate, up, grad_gate, grad_up, h, tile_tokens, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of h (x: the gradient of the down-projection's output) stays in this epilogue, which writes the gradients of
    gate and up, and h once more for the weight gradient, so that the forward pass need not keep it."""
    tile, block = tile_and_block()
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        cols = block * BN + tl.arange(0, BN)
        grad, _ = contract_tile(
            x, w, w, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o, False, K, C, BM, BN, BK, PRECISION
        )
        at, mask = tokens[:, None] * OUT + cols[None, :], (tokens >= 0)[:, None] & (cols < OUT)[None, :]
        g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(grad_gate + at, (grad * u * s * (1.0 + g * (1.0 - s))).to(h.dtype.element_ty), mask=mask)
        tl.store(grad_up + at, (grad * g * s).to(h.dtype.element_ty), mask=mask)
        tl.store(h + at, (g * s * u).to(h.dtype.element_ty), mask=mask)


@torch.library.custom_op("mohd::triton_ffn", mutates_args=())
def _ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor,
    indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int, sub_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    views, active = [w_gate.contiguous().t(), w_up.contiguous().t()], indices.shape[1]
    gate, up, h = (x.new_empty(x.shape[0], w_gate.shape[0]) for _ in range(3))
    swiglu_kernel.launch(
        lambda meta: (triton.cdiv(w_gate.shape[0], meta["BN"]), tiles.shape[0]),
        x.contiguous(), *views, gate, up, h, tiles, indices, w_gate.shape[0], *views[0].stride(),
        K=active, C=x.shape[1] // active, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return expand([h], [w_down.contiguous()], indices, tiles, w_down.shape[0] // sub_dims, scale), gate, up


@torch.library.custom_op("mohd::triton_ffn_backward", mutates_args=())
def _ffn_backward(
    grad: Tensor, z: Tensor, gate: Tensor, up: Tensor,
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor,
    indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    w_down, active = w_down.contiguous(), indices.shape[1]
    grad_y, grad_scale = scale_grad(grad, z, scale)
    grad_gate, grad_up, h = (torch.empty_like(gate) for _ in range(3))
    swiglu_grad_kernel.launch(
        lambda meta: (triton.cdiv(w_down.shape[1], meta["BN"]), tiles.shape[0]),
        grad_y.contiguous(), w_down, gate, up, grad_gate, grad_up, h, tiles, indices, w_down.shape[1], *w_down.stride(),
        K=active, C=grad_y.shape[1] // active, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    (grad_w_down,) = weight_grads(grad_y, [h], [w_down], pairs, ends, shared, active)
    views, grads = [w_gate.contiguous().t(), w_up.contiguous().t()], [grad_gate, grad_up]
    grad_x = expand(grads, views, indices, tiles, x.shape[1] // active)
    grad_w_gate, grad_w_up = weight_grads(x, grads, views, pairs, ends, shared, active)
    return grad_x, grad_w_gate.t().contiguous(), grad_w_up.t().contiguous(), grad_w_down, grad_scale


@_ffn.register_fake
def _ffn_shapes(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    gate, up = (x.new_empty(x.shape[0], weight.shape[0]) for weight in (w_gate, w_up))
    return compact_like(x, w_down, rest[0], rest[-1]), gate, up


_ffn_backward.register_fake(lambda grad, z, gate, up, *rest: like(*rest[:5]))


def _save_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.shared = inputs[9]


def _ffn_grad(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    return *_ffn_backward(grad, *ctx.saved_tensors, ctx.shared), *[None] * 6


_ffn.register_autograd(_ffn_grad, setup_context=_save_ffn)


def ffn(
    x_TKC: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, selection: Selection, scale_TK: Tensor
) -> Tensor:
    """``down(silu(gate x~) * up x~)``, slot k times `scale_TK[:, k]`, compact: [T, K*C]."""
    x, w_gate, w_up, w_down = cast_for_autocast(x_TKC, w_gate_FD, w_up_FD, w_down_DF)
    s = selection
    chosen = (s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared, s.sub_dims)
    return _ffn(x, w_gate, w_up, w_down, scale_TK, *chosen)[0]
