"""The GEMMs that up-projection, down-projection and feed-forward layer are made of: device code and launches.

Tokens that chose the same sub-dimensions are in tiles of BM (padded with -1; an empty tile starts with -1). A tile reads the same
weight slices for all its tokens, so shared and specialized sub-dimensions go through one K-loop into one accumulator. Grids
follow from shapes alone: nothing waits for the device.

    contract       x [T, K*C], W_i -> [T, O_i]        up-projections; the down-projection's gradient of its input
    expand         h_i [T, O_i], W_i -> [T, K*C]      the down-projection; the up-projections' gradient of their input
    weight_grads   x [T, K*C], h_i [T, O_i] -> W_i    the weight gradients of both

Each takes one to three weights in one launch: q, k and v, or gate and up.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C width, O_i (OUT) the other width of a weight.
Weights are seen as [D, O]: element (d, o) is at w + d * w_stride_d + o * w_stride_o, whichever way it is laid out in memory, but
all weights of a launch alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohd_train.kernels.triton.launch import PRECISION, Size, tuned

ROWS_AT_ONCE = tl.constexpr(8)  # tiles that go through all columns together: their rows of x stay in the L2 cache
TILE_SIZES = {
    64: (
        Size({"BN": 64, "BK": 32}, 4, 4), Size({"BN": 64, "BK": 64}, 4, 3), Size({"BN": 128, "BK": 32}, 8, 4),
        Size({"BN": 128, "BK": 64}, 8, 3),
    ),
    128: (
        Size({"BN": 64, "BK": 32}, 8, 4), Size({"BN": 128, "BK": 32}, 8, 4), Size({"BN": 128, "BK": 64}, 8, 3, 90),
        Size({"BN": 256, "BK": 32}, 8, 4, 90),
    ),
}  # fmt: skip
# Here BM are rows of a sub-dimension. One stage more than above: the row numbers are read before the rows
WEIGHT_SIZES = (
    Size({"BM": 64, "BN": 64, "BK": 32}, 4, 5), Size({"BM": 64, "BN": 128, "BK": 32}, 8, 5),
    Size({"BM": 64, "BN": 128, "BK": 64}, 8, 4), Size({"BM": 128, "BN": 128, "BK": 32}, 8, 5),
    Size({"BM": 128, "BN": 128, "BK": 64}, 8, 4), Size({"BM": 128, "BN": 256, "BK": 64}, 8, 4, 90),
)  # fmt: skip


@triton.jit
def tile_and_block():
    """(tile of tokens, block of columns) of a program on the grid (blocks, tiles): a few tiles go through all columns before the
    next ones start."""
    return tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), ROWS_AT_ONCE)


@triton.jit
def contract_tile(
    x, w, second, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o, PAIR: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32 twice: sum over slots k and places c of x[t, k, c] w[idx[first, k], c, o] for a tile's tokens; and with
    PAIR the same for the weight `second`, from the same rows of x.

    One loop for all slots: the compiler's pipeline of asynchronous copies is filled once a tile. The sub-dimension of a trip is
    read in the trip before it, so that it is no load that the copies wait for.
    """
    TRIPS: tl.constexpr = (C + BK - 1) // BK  # through one slice
    acc, acc2 = tl.zeros((BM, BN), dtype=tl.float32), tl.zeros((BM, BN), dtype=tl.float32)
    subs = indices + first * K
    sub = tl.load(subs)
    for trip in range(K * TRIPS):
        c = trip % TRIPS * BK + tl.arange(0, BK)
        a_at = x + tokens[:, None] * (K * C) + (trip // TRIPS * C + c)[None, :]
        a = tl.load(a_at, mask=(tokens >= 0)[:, None] & (c < C)[None, :], other=0.0)
        b_at = (sub * C + c)[:, None] * w_stride_d + cols[None, :].to(tl.int64) * w_stride_o
        b_mask = (c < C)[:, None] & (cols < OUT)[None, :]
        sub = tl.load(subs + tl.minimum((trip + 1) // TRIPS, K - 1))
        acc = tl.dot(a, tl.load(w + b_at, mask=b_mask, other=0.0), acc, input_precision=PRECISION)
        if PAIR:
            acc2 = tl.dot(a, tl.load(second + b_at, mask=b_mask, other=0.0), acc2, input_precision=PRECISION)
    return acc, acc2


@tuned(TILE_SIZES)
@triton.jit
def contract_kernel(
    x, w0, w1, w2, out0, out1, out2, tile_tokens, indices, OUT0, OUT1, OUT2, w_stride_d, w_stride_o,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i[t, o] = sum over k and c of x[t, k, c] w_i[idx[t, k], c, o]. The first grid axis runs through the columns of all
    weights."""
    tile, block = tile_and_block()
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
        acc, _ = contract_tile(
            x, w, w, tokens, first, cols, indices, OUT, w_stride_d, w_stride_o, False, K, C, BM, BN, BK, PRECISION
        )
        out_at = out + tokens[:, None] * OUT + cols[None, :]
        tl.store(out_at, acc.to(out0.dtype.element_ty), mask=(tokens >= 0)[:, None] & (cols < OUT)[None, :])


def contract(x_TKC: Tensor, weights_dO: Sequence[Tensor], indices_TK: Tensor, tiles: Tensor) -> list[Tensor]:
    """Up-projections, and the down-projection's gradient of its input: [T, O_i] for each weight from compact [T, K*C]."""
    active, widths = indices_TK.shape[1], _widths(weights_dO)
    outs = [x_TKC.new_empty(x_TKC.shape[0], weight.shape[1]) for weight in weights_dO]
    contract_kernel.launch(
        lambda meta: (_column_blocks(widths, meta["BN"]), tiles.shape[0]),
        x_TKC.contiguous(), *_three(weights_dO), *_three(outs), tiles, indices_TK, *widths, *weights_dO[0].stride(),
        K=active, C=x_TKC.shape[1] // active, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return outs


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


@tuned(TILE_SIZES)
@triton.jit
def expand_kernel(
    h0, h1, h2, w0, w1, w2, scale, out, tile_tokens, indices, OUT0, OUT1, OUT2, w_stride_d, w_stride_o,
    COUNT: tl.constexpr, SCALED: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, k, c] = scale[t, k] * sum over the COUNT weights i and over o of h_i[t, o] w_i[idx[t, k], c, o]."""
    tile, block = tile_and_block()
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


def expand(
    inputs_TO: Sequence[Tensor], weights_dO: Sequence[Tensor], indices_TK: Tensor, tiles: Tensor, width: int, scale_TK:
    Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The down-projection, and the up-projections' gradient of their input: compact [T, K*C], the sum over the weights, slot k
    times `scale_TK[:, k]`."""
    tokens, active = indices_TK.shape
    out = inputs_TO[0].new_empty(tokens, active * width)
    expand_kernel.launch(
        lambda meta: (active * triton.cdiv(width, meta["BN"]), tiles.shape[0]),
        *_three([part.contiguous() for part in inputs_TO]), *_three(weights_dO),
        out if scale_TK is None else scale_TK.contiguous(), out, tiles, indices_TK,
        *_widths(weights_dO), *weights_dO[0].stride(),
        COUNT=len(weights_dO), SCALED=scale_TK is not None, K=active, C=width, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return out


@tuned(WEIGHT_SIZES)
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


def weight_grads(
    x_TKC: Tensor, inputs_TO: Sequence[Tensor], like_dO: Sequence[Tensor], pairs: Tensor, ends: Tensor, shared: int,
    active: int
) -> list[Tensor]:  # fmt: skip
    """Gradients of weights seen as [D, O_i], in those weights' memory order."""
    grads, width, widths = [torch.empty_like(like) for like in like_dO], x_TKC.shape[1] // active, _widths(like_dO)
    weight_grad_kernel.launch(
        lambda meta: (
            like_dO[0].shape[0] // width, triton.cdiv(width, meta["BM"]), _column_blocks(widths, meta["BN"])
        ),
        x_TKC.contiguous(), *_three([part.contiguous() for part in inputs_TO]), *_three(grads), pairs, ends,
        x_TKC.shape[0], *widths, *grads[0].stride(), K=active, S=shared, C=width, PRECISION=PRECISION,
    )  # fmt: skip
    return grads


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One to three tensors as the three that a kernel takes: the first one fills up."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _widths(weights_dO: Sequence[Tensor]) -> list[int]:
    return [*[weight.shape[1] for weight in weights_dO], 0, 0][:3]


def _column_blocks(widths: Sequence[int], block: int) -> int:
    return sum(triton.cdiv(width, block) for width in widths)
