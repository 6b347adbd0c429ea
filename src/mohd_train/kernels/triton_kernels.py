"""The device code of the `triton` backend. No program waits for the host: grids come from shapes alone.

Tokens that chose the same sub-dimensions stand in tiles of BM (-1 fills a tile up, an empty tile starts with -1): a tile reads the
same weight slices for all its tokens, so shared and specialized sub-dimensions go through one K-loop into one accumulator.

Shapes: T tokens, N sub-dimensions, K active, S shared, C width, OUT the other width of the weight (output or inner).
A weight is addressed as w[d * w_stride_d + o * w_stride_o], d over the hidden dims, whichever way it lies in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def contract_kernel(
    x, w, out, tile_tokens, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, o] = sum over slots k and places c of x[t, k, c] w[idx[t, k], c, o]: up-projection, down-projection's dgrad."""
    tile, block = tl.program_id(0), tl.program_id(1)
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        live = tokens >= 0
        cols = block * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(K):
            sub = tl.load(indices + first * K + k)
            for c0 in range(0, C, BK):
                c = c0 + tl.arange(0, BK)
                a_at = x + tokens[:, None] * (K * C) + (k * C + c)[None, :]
                a = tl.load(a_at, mask=live[:, None] & (c < C)[None, :], other=0.0)
                b_at = w + (sub * C + c)[:, None] * w_stride_d + cols[None, :].to(tl.int64) * w_stride_o
                b = tl.load(b_at, mask=(c < C)[:, None] & (cols < OUT)[None, :], other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
        out_at = out + tokens[:, None] * OUT + cols[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & (cols < OUT)[None, :])


@triton.jit
def expand_kernel(
    h, w, out, tile_tokens, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, k, c] = sum over o of h[t, o] w[idx[t, k], c, o]: down-projection, up-projection's dgrad."""
    tile, block = tl.program_id(0), tl.program_id(1)
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        live = tokens >= 0
        blocks: tl.constexpr = (C + BN - 1) // BN
        k = block // blocks
        c = (block % blocks) * BN + tl.arange(0, BN)
        sub = tl.load(indices + first * K + k)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for o0 in range(0, OUT, BK):
            o = o0 + tl.arange(0, BK)
            a = tl.load(h + tokens[:, None] * OUT + o[None, :], mask=live[:, None] & (o < OUT)[None, :], other=0.0)
            b_at = w + (sub * C + c)[None, :] * w_stride_d + o[:, None].to(tl.int64) * w_stride_o
            b = tl.load(b_at, mask=(o < OUT)[:, None] & (c < C)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        out_at = out + tokens[:, None] * (K * C) + (k * C + c)[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


@triton.jit
def weight_grad_kernel(
    x, h, grad, pairs, ends, T, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad[i, c, o] = sum over the pairs (t, k) of sub-dimension i of x[t, k, c] h[t, o]; 0 where no token chose i."""
    i = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    shared = i < S
    place = tl.maximum(i - S, 0)
    start = tl.where(shared | (place == 0), 0, tl.load(ends + place - 1, mask=place > 0, other=0))
    stop = tl.where(shared, T, tl.load(ends + place, mask=i >= S, other=0))
    acc = tl.zeros((BC, BO), dtype=tl.float32)
    for p0 in range(start, stop, BK):
        p = p0 + tl.arange(0, BK)
        inside = p < stop
        chosen = tl.load(pairs + p, mask=inside & (i >= S), other=0)
        pair = tl.where(shared, p.to(tl.int64) * K + i, chosen)
        a = tl.load(x + pair[None, :] * C + c[:, None], mask=inside[None, :] & (c < C)[:, None], other=0.0)
        b = tl.load(h + (pair // K)[:, None] * OUT + o[None, :], mask=inside[:, None] & (o < OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = grad + (i.to(tl.int64) * C + c)[:, None] * w_stride_d + o[None, :].to(tl.int64) * w_stride_o
    tl.store(at, acc.to(grad.dtype.element_ty), mask=(c < C)[:, None] & (o < OUT)[None, :])


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
