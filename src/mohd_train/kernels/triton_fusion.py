"""Device code of the `triton` backend's group fusion, with the residual, and of its gradients (eqs. 9, 17).

Shapes: T tokens, N sub-dimensions, K active, S shared, C width. `mixing` is [N (from), N (to), C].
"""

from __future__ import annotations

import triton
import triton.language as tl


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
