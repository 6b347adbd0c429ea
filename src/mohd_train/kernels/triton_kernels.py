"""The device code of the `triton` backend. No program waits for the host: grids come from shapes alone.

Programs are numbered so that a few tiles go through all columns before the next ones start.
Tokens that chose the same sub-dimensions stand in tiles of BM (-1 fills a tile up, an empty tile starts with -1): a tile reads the
same weight slices for all its tokens, so shared and specialized sub-dimensions go through one K-loop into one accumulator.

Shapes: T tokens, N sub-dimensions, K active, S shared, C width, OUT the other width of the weight (output or inner).
A weight is addressed as w[d * w_stride_d + o * w_stride_o], d over the hidden dims, whichever way it lies in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS_AT_ONCE = tl.constexpr(8)  # tiles of tokens that run through all columns together: their rows stay in the L2 cache


@triton.jit
def _tile_and_block():
    """(tile of tokens, block of columns) of a program on the grid (blocks, tiles)."""
    return tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), ROWS_AT_ONCE)


@triton.jit
def _contract(
    x, w, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32: sum over slots k and places c of x[t, k, c] w[idx[first, k], c, o] for a tile's tokens."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(K):
        sub = tl.load(indices + first * K + k)
        for c0 in range(0, C, BK):
            c = c0 + tl.arange(0, BK)
            a_at = x + tokens[:, None] * (K * C) + (k * C + c)[None, :]
            a = tl.load(a_at, mask=(tokens >= 0)[:, None] & (c < C)[None, :], other=0.0)
            b_at = w + (sub * C + c)[:, None] * w_stride_d + cols[None, :].to(tl.int64) * w_stride_o
            b = tl.load(b_at, mask=(c < C)[:, None] & (cols < OUT)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def contract_kernel(
    x, w0, w1, w2, out0, out1, out2, tile_tokens, indices, OUT0, OUT1, OUT2, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i[t, o] = sum over k and c of x[t, k, c] w_i[idx[t, k], c, o]: up-projections (q, k, v in one launch: the
    first grid axis runs through the columns of all of them), down-projection's dgrad."""
    tile, block = _tile_and_block()
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        before1 = tl.cdiv(OUT0, BN)
        before2 = before1 + tl.cdiv(OUT1, BN)
        if block < before1:
            w, out, OUT, place = w0, out0, OUT0, block
        elif block < before2:
            w, out, OUT, place = w1, out1, OUT1, block - before1
        else:
            w, out, OUT, place = w2, out2, OUT2, block - before2
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        cols = place * BN + tl.arange(0, BN)
        acc = _contract(x, w, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o, K, C, BM, BN, BK, PRECISION)
        out_at = out + tokens[:, None] * OUT + cols[None, :]
        tl.store(out_at, acc.to(out0.dtype.element_ty), mask=(tokens >= 0)[:, None] & (cols < OUT)[None, :])


@triton.jit
def swiglu_kernel(
    x, w_gate, w_up, gate, up, h, tile_tokens, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gate and up as `contract_kernel` makes them, in one K-loop that reads x once, and h = silu(gate) up beside them."""
    tile, block = _tile_and_block()
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        live = tokens >= 0
        cols = block * BN + tl.arange(0, BN)
        g, u = tl.zeros((BM, BN), dtype=tl.float32), tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(K):
            sub = tl.load(indices + first * K + k)
            for c0 in range(0, C, BK):
                c = c0 + tl.arange(0, BK)
                a_at = x + tokens[:, None] * (K * C) + (k * C + c)[None, :]
                a = tl.load(a_at, mask=live[:, None] & (c < C)[None, :], other=0.0)
                b_at = (sub * C + c)[:, None] * w_stride_d + cols[None, :].to(tl.int64) * w_stride_o
                b_mask = (c < C)[:, None] & (cols < OUT)[None, :]
                g = tl.dot(a, tl.load(w_gate + b_at, mask=b_mask, other=0.0), g, input_precision=PRECISION)
                u = tl.dot(a, tl.load(w_up + b_at, mask=b_mask, other=0.0), u, input_precision=PRECISION)
        at, mask = tokens[:, None] * OUT + cols[None, :], live[:, None] & (cols < OUT)[None, :]
        tl.store(gate + at, g.to(h.dtype.element_ty), mask=mask)
        tl.store(up + at, u.to(h.dtype.element_ty), mask=mask)
        tl.store(h + at, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_grad_kernel(
    x, w, gate, up, grad_gate, grad_up, h, tile_tokens, indices, OUT, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Down-projection's dgrad (x: gradient of its output), which goes no further than this epilogue: the gradients of gate
    and up, and h again for the weight gradient, so that the forward pass need not keep it."""
    tile, block = _tile_and_block()
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        cols = block * BN + tl.arange(0, BN)
        grad = _contract(x, w, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o, K, C, BM, BN, BK, PRECISION)
        at, mask = tokens[:, None] * OUT + cols[None, :], (tokens >= 0)[:, None] & (cols < OUT)[None, :]
        g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(grad_gate + at, (grad * u * s * (1.0 + g * (1.0 - s))).to(h.dtype.element_ty), mask=mask)
        tl.store(grad_up + at, (grad * g * s).to(h.dtype.element_ty), mask=mask)
        tl.store(h + at, (g * s * u).to(h.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    acc, h, w, tokens, sub, c, OUT, w_stride_d, w_stride_o, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + sum over o of h[t, o] w[sub, c, o]."""
    for o0 in range(0, OUT, BK):
        o = o0 + tl.arange(0, BK)
        a = tl.load(h + tokens[:, None] * OUT + o[None, :], mask=(tokens >= 0)[:, None] & (o < OUT)[None, :], other=0.0)
        b_at = w + (sub * C + c)[None, :] * w_stride_d + o[:, None].to(tl.int64) * w_stride_o
        b = tl.load(b_at, mask=(o < OUT)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def expand_kernel(
    h0, h1, h2, w0, w1, w2, scale, out, tile_tokens, indices, OUT0, OUT1, OUT2, w_stride_d, w_stride_o,
    COUNT: tl.constexpr, SCALED: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, k, c] = scale[t, k] * sum over the COUNT weights i and over o of h_i[t, o] w_i[idx[t, k], c, o]:
    down-projection (scale: alpha * g), up-projections' dgrad."""
    tile, block = _tile_and_block()
    first = tl.load(tile_tokens + tile * BM)
    if first >= 0:
        tokens = tl.load(tile_tokens + tile * BM + tl.arange(0, BM))
        live = tokens >= 0
        blocks: tl.constexpr = (C + BN - 1) // BN
        k = block // blocks
        c = (block % blocks) * BN + tl.arange(0, BN)
        sub = tl.load(indices + first * K + k)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = _expand(acc, h0, w0, tokens, sub, c, OUT0, w_stride_d, w_stride_o, C, BK, PRECISION)
        if COUNT > 1:
            acc = _expand(acc, h1, w1, tokens, sub, c, OUT1, w_stride_d, w_stride_o, C, BK, PRECISION)
        if COUNT > 2:
            acc = _expand(acc, h2, w2, tokens, sub, c, OUT2, w_stride_d, w_stride_o, C, BK, PRECISION)
        if SCALED:
            acc *= tl.load(scale + tokens * K + k, mask=live, other=0.0).to(tl.float32)[:, None]
        out_at = out + tokens[:, None] * (K * C) + (k * C + c)[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


@triton.jit
def scale_grad_kernel(grad_z, z, scale, grad_y, grad_scale, ROWS, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """For z = scale * y, rows (t, k): grad_y = scale * grad_z, and grad_scale = grad_z . y as a row-dot, y = z / scale.

    z is kept for the fusion's gradient anyway, y is not. A scale of 0 (a score that underflowed, which the softmax lets
    no gradient through) gives 0.
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


@triton.jit
def weight_grad_kernel(
    x, h0, h1, h2, grad0, grad1, grad2, pairs, ends, T, OUT0, OUT1, OUT2, w_stride_d, w_stride_o,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_j[i, c, o] = sum over the pairs (t, k) of sub-dimension i of x[t, k, c] h_j[t, o]; 0 where no token chose i.
    The third grid axis runs through the columns of all weights."""
    i, block = tl.program_id(0), tl.program_id(2)
    before1 = tl.cdiv(OUT0, BN)
    before2 = before1 + tl.cdiv(OUT1, BN)
    if block < before1:
        h, grad, OUT, column = h0, grad0, OUT0, block
    elif block < before2:
        h, grad, OUT, column = h1, grad1, OUT1, block - before1
    else:
        h, grad, OUT, column = h2, grad2, OUT2, block - before2
    c = tl.program_id(1) * BM + tl.arange(0, BM)
    o = column * BN + tl.arange(0, BN)
    shared = i < S
    place = tl.maximum(i - S, 0)
    start = tl.where(shared | (place == 0), 0, tl.load(ends + place - 1, mask=place > 0, other=0))
    stop = tl.where(shared, T, tl.load(ends + place, mask=i >= S, other=0))
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for p0 in range(start, stop, BK):
        p = p0 + tl.arange(0, BK)
        inside = p < stop
        chosen = tl.load(pairs + p, mask=inside & (i >= S), other=0)
        pair = tl.where(shared, p.to(tl.int64) * K + i, chosen)
        a = tl.load(x + pair[None, :] * C + c[:, None], mask=inside[None, :] & (c < C)[:, None], other=0.0)
        b = tl.load(h + (pair // K)[:, None] * OUT + o[None, :], mask=inside[:, None] & (o < OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = grad + (i.to(tl.int64) * C + c)[:, None] * w_stride_d + o[None, :].to(tl.int64) * w_stride_o
    tl.store(at, acc.to(grad0.dtype.element_ty), mask=(c < C)[:, None] & (o < OUT)[None, :])
