"""Group fusion with the residual, of the `triton` backend (eqs. 9, 17). Sums in float32.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C width. `mixing` is [N (from), N (to), C]; z is [T, K*C].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohd_train.kernels.selection import Selection
from mohd_train.kernels.triton.launch import ROW_SIZES, like, tuned


@tuned(ROW_SIZES)
@triton.jit
def fuse_kernel(
    z, mixing, residual, out, indices, T, N, K: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """out[t, i, j] = residual[t, i, j] + sum_k mixing[idx[t, k], i, j] z[t, k, j]."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    i = tl.program_id(1)
    j = tl.program_id(2) * BC + tl.arange(0, BC)
    mask = (t < T)[:, None] & (j < C)[None, :]
    at = (t * N + i)[:, None] * C + j[None, :]
    acc = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    for k in range(K):
        sub = tl.load(indices + t * K + k, mask=t < T, other=0)
        m = tl.load(mixing + (sub * N + i)[:, None] * C + j[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += m * tl.load(z + (t * K + k)[:, None] * C + j[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@tuned(ROW_SIZES)
@triton.jit
def fuse_grad_z_kernel(
    grad, mixing, grad_z, indices, T, N, K: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """grad_z[t, k, j] = sum_i mixing[idx[t, k], i, j] grad[t, i, j]."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    k = tl.program_id(1)
    j = tl.program_id(2) * BC + tl.arange(0, BC)
    mask = (t < T)[:, None] & (j < C)[None, :]
    sub = tl.load(indices + t * K + k, mask=t < T, other=0)
    acc = tl.zeros((BT, BC), dtype=tl.float32)
    for i in range(N):
        m = tl.load(mixing + (sub * N + i)[:, None] * C + j[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += m * tl.load(grad + (t * N + i)[:, None] * C + j[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_z + (t * K + k)[:, None] * C + j[None, :], acc.to(grad_z.dtype.element_ty), mask=mask)


@tuned(ROW_SIZES)
@triton.jit
def fuse_grad_mixing_kernel(
    grad, z, grad_mixing, pairs, ends, T, N,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_mixing[n, i, j] = sum over the pairs (t, k) of sub-dimension n of z[t, k, j] grad[t, i, j]."""
    n, i = tl.program_id(0), tl.program_id(1)
    j = tl.program_id(2) * BC + tl.arange(0, BC)
    shared = n < S
    place = tl.maximum(n - S, 0)
    start = tl.where(shared | (place == 0), 0, tl.load(ends + place - 1, mask=place > 0, other=0))
    stop = tl.where(shared, T, tl.load(ends + place, mask=n >= S, other=0))
    acc = tl.zeros((BC,), dtype=tl.float32)
    for p0 in range(start, stop, BT):
        p = p0 + tl.arange(0, BT)
        inside = p < stop
        chosen = tl.load(pairs + p, mask=inside & (n >= S), other=0)
        pair = tl.where(shared, p.to(tl.int64) * K + n, chosen)
        mask = inside[:, None] & (j < C)[None, :]
        a = tl.load(z + pair[:, None] * C + j[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(grad + (pair // K * N + i)[:, None] * C + j[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(a * b, axis=0)
    tl.store(grad_mixing + (n.to(tl.int64) * N + i) * C + j, acc.to(grad_mixing.dtype.element_ty), mask=j < C)


@torch.library.custom_op("mohd::triton_fuse", mutates_args=())
def _fuse(
    z: Tensor, mixing: Tensor, residual: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> Tensor:
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    fuse_kernel.launch(
        lambda meta: (triton.cdiv(tokens, meta["BT"]), sub_dims, triton.cdiv(width, meta["BC"])),
        z.contiguous(), mixing.contiguous(), residual.contiguous(), out, indices, tokens, sub_dims, K=active, C=width,
    )  # fmt: skip
    return out


@torch.library.custom_op("mohd::triton_fuse_backward", mutates_args=())
def _fuse_backward(
    grad: Tensor, z: Tensor, mixing: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    grad, z, mixing = grad.contiguous(), z.contiguous(), mixing.contiguous()
    grad_z, grad_mixing = torch.empty_like(z), torch.empty_like(mixing)
    fuse_grad_z_kernel.launch(
        lambda meta: (triton.cdiv(tokens, meta["BT"]), active, triton.cdiv(width, meta["BC"])),
        grad, mixing, grad_z, indices, tokens, sub_dims, K=active, C=width,
    )  # fmt: skip
    fuse_grad_mixing_kernel.launch(
        lambda meta: (sub_dims, sub_dims, triton.cdiv(width, meta["BC"])),
        grad, z, grad_mixing, pairs, ends, tokens, sub_dims, K=active, S=shared, C=width,
    )  # fmt: skip
    return grad_z, grad_mixing


_fuse.register_fake(lambda z, mixing, residual, *rest: like(residual)[0])
_fuse_backward.register_fake(lambda grad, z, mixing, *rest: like(z, mixing))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, mixing, _, indices, pairs, ends, ctx.shared = inputs
    ctx.save_for_backward(z, mixing, indices, pairs, ends)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_fuse_backward(grad, *ctx.saved_tensors, ctx.shared), grad, None, None, None, None


_fuse.register_autograd(_gradient, setup_context=_save)


def fuse_residual(z_TKC: Tensor, mixing_NNC: Tensor, selection: Selection, residual_TD: Tensor) -> Tensor:
    """``residual + y'`` [T, D] in the residual's dtype."""
    s = selection
    return _fuse(z_TKC, mixing_NNC, residual_TD, s.indices_TK, s.pairs, s.ends, s.shared)
