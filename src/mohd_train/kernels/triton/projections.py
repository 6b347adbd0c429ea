"""Up- and down-projection of the `triton` backend (eqs. 3-5, 8), each the other's transpose.

Saved for the backward pass: the inputs, and of the down-projection its scaled output z, which the fusion saves anyway.

Shapes: T tokens, D hidden, K active, S shared, C width, O_i an output width, F inner width. `tiles` int64 [M, BM]: `gemm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohd_train.kernels.grouped.products import cast_for_autocast
from mohd_train.kernels.selection import Selection
from mohd_train.kernels.triton.gemm import contract, expand, weight_grads
from mohd_train.kernels.triton.launch import ROW_SIZES, like, tuned

# Up-projection


@torch.library.custom_op("mohd::triton_up", mutates_args=())
def _up(
    x: Tensor, weights: list[Tensor], indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> list[Tensor]:
    return contract(x, [weight.contiguous().t() for weight in weights], indices, tiles)


@torch.library.custom_op("mohd::triton_up_backward", mutates_args=())
def _up_backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor],
    indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    views, active = [weight.contiguous().t() for weight in weights], indices.shape[1]
    grad_x = expand(grads, views, indices, tiles, x.shape[1] // active)
    grad_weights = weight_grads(x, grads, views, pairs, ends, shared, active)
    return grad_x, [grad.t().contiguous() for grad in grad_weights]


_up.register_fake(lambda x, weights, *rest: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights])
_up_backward.register_fake(lambda grads, x, weights, *rest: (like(x)[0], list(like(*weights))))


def _save_up(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, *chosen, ctx.shared = inputs
    ctx.save_for_backward(x, *chosen, *weights)


def _up_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    grad_x, grad_weights = _up_backward(list(grads), x, saved[4:], *saved[:4], ctx.shared)
    return grad_x, grad_weights, None, None, None, None, None


_up.register_autograd(_up_grad, setup_context=_save_up)


def up(x_TKC: Tensor, weights_OD: Sequence[Tensor], selection: Selection) -> tuple[Tensor, ...]:
    """``W x~`` from the compact active inputs, one to three weights in one launch: [T, O_i] each."""
    assert len(weights_OD) <= 3
    (x_TKC, *weights), s = cast_for_autocast(x_TKC, *weights_OD), selection
    return tuple(_up(x_TKC, weights, s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared))


# Down-projection


@tuned(ROW_SIZES)
@triton.jit
def scale_grad_kernel(grad_z, z, scale, grad_y, grad_scale, ROWS, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """For z = scale * y, rows (t, k): grad_y = scale * grad_z, and grad_scale = grad_z . y, a dot product a row, y = z / scale.

    z is saved for the fusion's gradient anyway, y is not. Where scale is 0 (a score that underflowed, which the softmax lets no
    gradient through) grad_scale is 0.
    """
    row = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    a = tl.load(scale + row, mask=row < ROWS, other=0.0).to(tl.float32)
    dot = tl.zeros((BT,), dtype=tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        at, mask = row[:, None] * C + c[None, :], (row < ROWS)[:, None] & (c < C)[None, :]
        g = tl.load(grad_z + at, mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(g * tl.load(z + at, mask=mask, other=0.0).to(tl.float32), axis=1)
        tl.store(grad_y + at, (g * a[:, None]).to(grad_y.dtype.element_ty), mask=mask)
    dot = tl.where(a == 0.0, 0.0, dot / tl.where(a == 0.0, 1.0, a))
    tl.store(grad_scale + row, dot.to(grad_scale.dtype.element_ty), mask=row < ROWS)


def scale_grad(grad_z: Tensor, z_TKC: Tensor, scale_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of y [T, K*C], gradient of the scale [T, K]) of ``z = scale * y``, with y recomputed from z."""
    grad_y, grad_scale = torch.empty_like(z_TKC), torch.empty_like(scale_TK)
    scale_grad_kernel.launch(
        lambda meta: (triton.cdiv(scale_TK.numel(), meta["BT"]),),
        grad_z.contiguous(), z_TKC, scale_TK.contiguous(), grad_y, grad_scale, scale_TK.numel(),
        C=z_TKC.shape[1] // scale_TK.shape[1],
    )  # fmt: skip
    return grad_y, grad_scale


@torch.library.custom_op("mohd::triton_down", mutates_args=())
def _down(
    h: Tensor, weight: Tensor, scale: Tensor,
    indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int, sub_dims: int,
) -> Tensor:  # fmt: skip
    return expand([h], [weight.contiguous()], indices, tiles, weight.shape[0] // sub_dims, scale)


@torch.library.custom_op("mohd::triton_down_backward", mutates_args=())
def _down_backward(
    grad: Tensor, z: Tensor, h: Tensor, weight: Tensor, scale: Tensor,
    indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weight = weight.contiguous()
    grad_y, grad_scale = scale_grad(grad, z, scale)
    (grad_h,) = contract(grad_y, [weight], indices, tiles)
    (grad_weight,) = weight_grads(grad_y, [h], [weight], pairs, ends, shared, indices.shape[1])
    return grad_h, grad_weight, grad_scale


_down.register_fake(lambda h, weight, scale, indices, *rest: compact_like(h, weight, indices, rest[-1]))
_down_backward.register_fake(lambda grad, z, h, weight, scale, *rest: like(h, weight, scale))


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:7])
    ctx.shared = inputs[7]


def _down_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_down_backward(grad, *ctx.saved_tensors, ctx.shared), *[None] * 6


_down.register_autograd(_down_grad, setup_context=_save_down)


def down(h_TF: Tensor, weight_DF: Tensor, selection: Selection, scale_TK: Tensor) -> Tensor:
    """The active slices of ``W h``, slot k times `scale_TK[:, k]`, compact: [T, K*C]."""
    h_TF, weight_DF = cast_for_autocast(h_TF, weight_DF)
    s = selection
    return _down(h_TF, weight_DF, scale_TK, s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared, s.sub_dims)


def compact_like(h: Tensor, weight: Tensor, indices: Tensor, sub_dims: int) -> Tensor:
    """Compact [T, K*C] as ops return it for fake tensors."""
    return h.new_empty(h.shape[0], indices.shape[1] * (weight.shape[0] // sub_dims))
