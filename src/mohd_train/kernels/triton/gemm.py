"""The GEMMs of the up-projections, the down-projection and the feed-forward layer: device code and launches.

Tokens that chose the same sub-dimensions share tiles of BM (padded with -1; an empty tile starts with -1). A tile reads the same
weight slices for all its tokens, so shared and specialized sub-dimensions go through one K-loop into one accumulator. Grids
follow from shapes alone, so nothing waits for the device.

    contract       x [T, K*C], W_i -> [T, O_i]        up-projections; the down-projection's gradient of its input
    expand         h_i [T, O_i], W_i -> [T, K*C]      the down-projection; the up-projections' gradient of their input
    weight_grads   x [T, K*C], h_i [T, O_i] -> W_i    the weight gradients of both

Each takes one to three weights in one launch: q, k and v, or gate and up.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C width, O_i (OUT) the other width of a weight.
Weights are seen as [D, O]: element (d, o) is at w + d * w_stride_d + o * w_stride_o, whatever the memory layout, which is the same
for all weights of a launch.
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
# Here BM are rows of a sub-dimension
WEIGHT_SIZES = (
    Size({"BM": 64, "BN": 64, "BK": 32}, 4, 4), Size({"BM": 64, "BN": 128, "BK": 32}, 8, 4),
    Size({"BM": 64, "BN": 128, "BK": 64}, 8, 3), Size({"BM": 128, "BN": 128, "BK": 32}, 8, 4),
    Size({"BM": 128, "BN": 128, "BK": 64}, 8, 3), Size({"BM": 128, "BN": 256, "BK": 64}, 8, 3, 90),
)  # fmt: skip
PROGRAMS = 3 * 132  # three for each multiprocessor of an H100, so that the last ones leave few of them idle
LEAST_TOKENS = 1024  # in a part; for fewer, writing its sums costs more than it gains


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
        before1 = tl.cdiv(OUT0, BK)
        before2 = before1 + tl.cdiv(OUT1, BK)
        for trip in range(before2 + tl.cdiv(OUT2, BK)):  # one loop for all weights
            h, w, OUT, place = h0, w0, OUT0, trip
            if COUNT > 1:
                past = trip >= before1
                h, w, OUT = tl.where(past, h1, h), tl.where(past, w1, w), tl.where(past, OUT1, OUT)
                place = tl.where(past, trip - before1, place)
            if COUNT > 2:
                past = trip >= before2
                h, w, OUT = tl.where(past, h2, h), tl.where(past, w2, w), tl.where(past, OUT2, OUT)
                place = tl.where(past, trip - before2, place)
            o = place * BK + tl.arange(0, BK)
            a = tl.load(h + tokens[:, None] * OUT + o[None, :], mask=live[:, None] & (o < OUT)[None, :], other=0.0)
            b_at = w + (sub * C + c)[None, :] * w_stride_d + o[:, None].to(tl.int64) * w_stride_o
            b = tl.load(b_at, mask=(o < OUT)[:, None] & (c < C)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SCALED:
            acc *= tl.load(scale + tokens * K + k, mask=live, other=0.0).to(tl.float32)[:, None]
        out_at = out + tokens[:, None] * (K * C) + (k * C + c)[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


def expand(
    inputs_TO: Sequence[Tensor], weights_dO: Sequence[Tensor], indices_TK: Tensor, tiles: Tensor, width: int,
    scale_TK: Tensor | None = None,
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
    x, h0, h1, h2, grad0, grad1, grad2, part0, part1, part2, pairs, ends, T, SPAN, OUT0, OUT1, OUT2,
    w_stride_d, w_stride_o, part_stride_d, part_stride_o,
    PARTS: tl.constexpr, K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_j[i, c, o] = sum over the pairs (t, k) of sub-dimension i of x[t, k, c] h_j[t, o]; 0 where no token chose i.
    The second grid axis runs through the columns of all weights.

    The third, whose first programs start first, runs through the shared sub-dimensions, then the specialized ones, which have
    fewer tokens. With PARTS > 1 each shared one is there that often, each time for SPAN tokens, and writes part_j[p, i, c, o].
    """
    block, i = tl.program_id(1), tl.program_id(2)
    before1 = tl.cdiv(OUT0, BN)
    before2 = before1 + tl.cdiv(OUT1, BN)
    if block < before1:
        h, grad, part, OUT, column = h0, grad0, part0, OUT0, block
    elif block < before2:
        h, grad, part, OUT, column = h1, grad1, part1, OUT1, block - before1
    else:
        h, grad, part, OUT, column = h2, grad2, part2, OUT2, block - before2
    c = tl.program_id(0) * BM + tl.arange(0, BM)
    o = column * BN + tl.arange(0, BN)
    shared, p, is_part = i < S * PARTS, 0, False
    if PARTS > 1:
        p, is_part = i // S, shared
        i = tl.where(shared, i % S, i - S * (PARTS - 1))
    place = tl.maximum(i - S, 0)
    start = tl.where(shared, p * SPAN, tl.load(ends + place - 1, mask=place > 0, other=0))
    stop = tl.where(shared, tl.minimum(p * SPAN + SPAN, T), tl.load(ends + place, mask=i >= S, other=0))
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    rows = tl.arange(0, BK)
    chosen = tl.load(pairs + start + rows, mask=(start + rows < stop) & (i >= S), other=0)
    for p0 in range(start, stop, BK):
        inside = p0 + rows < stop
        pair = tl.where(shared, (p0 + rows).to(tl.int64) * K + i, chosen)
        chosen = tl.load(pairs + p0 + BK + rows, mask=(p0 + BK + rows < stop) & (i >= S), other=0)  # of the next trip
        a = tl.load(x + pair[None, :] * C + c[:, None], mask=inside[None, :] & (c < C)[:, None], other=0.0)
        b = tl.load(h + (pair // K)[:, None] * OUT + o[None, :], mask=inside[:, None] & (o < OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    row, mask = (i.to(tl.int64) * C + c)[:, None], (c < C)[:, None] & (o < OUT)[None, :]
    if is_part:
        row += p * S * C
        tl.store(part + row * part_stride_d + o[None, :].to(tl.int64) * part_stride_o, acc, mask=mask)
    else:
        at = grad + row * w_stride_d + o[None, :].to(tl.int64) * w_stride_o
        tl.store(at, acc.to(grad0.dtype.element_ty), mask=mask)


def token_parts(tokens: int, shared: int, width: int, widths: Sequence[int]) -> int:
    """The number of parts that the tokens are split into for the weight gradients of shared sub-dimensions; from shapes alone.

    A block of a shared sub-dimension sums over all tokens, one of a specialized sub-dimension over those that chose it. Where
    there are few such blocks, most of a GPU would wait for them. With at most `PROGRAMS` blocks of float32 the partial sums take at
    most 25 MiB.
    """
    blocks = shared * triton.cdiv(width, 128) * _column_blocks(widths, 128)  # whatever block sizes are chosen
    return max(1, min(PROGRAMS // blocks, tokens // LEAST_TOKENS)) if blocks else 1


def weight_grads(
    x_TKC: Tensor, inputs_TO: Sequence[Tensor], like_dO: Sequence[Tensor], pairs: Tensor, ends: Tensor,
    shared: int, active: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of weights seen as [D, O_i], in those weights' memory order; the same bits at every call."""
    tokens, width, widths = x_TKC.shape[0], x_TKC.shape[1] // active, _widths(like_dO)
    grads, sub_dims = [torch.empty_like(like) for like in like_dO], like_dO[0].shape[0] // width
    count = token_parts(tokens, shared, width, widths)
    parts = grads if count == 1 else [_partial_sums(count * shared * width, like) for like in like_dO]
    weight_grad_kernel.launch(
        lambda meta: (
            triton.cdiv(width, meta["BM"]), _column_blocks(widths, meta["BN"]), shared * (count - 1) + sub_dims
        ),
        x_TKC.contiguous(), *_three([part.contiguous() for part in inputs_TO]), *_three(grads), *_three(parts), pairs,
        ends, tokens, triton.cdiv(tokens, count), *widths, *grads[0].stride(), *parts[0].stride(),
        PARTS=count, K=active, S=shared, C=width, PRECISION=PRECISION,
    )  # fmt: skip
    if count > 1:
        for grad, part in zip(grads, parts, strict=True):
            grad[: shared * width].copy_(part.unflatten(0, (count, -1)).sum(0))
    return grads


def _partial_sums(rows: int, like_dO: Tensor) -> Tensor:
    """Float32 [rows, O], contiguous along the same dim as `like_dO`."""
    columns = like_dO.shape[1]
    if like_dO.stride(1) == 1:
        return like_dO.new_empty(rows, columns, dtype=torch.float32)
    return like_dO.new_empty(columns, rows, dtype=torch.float32).t()


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One to three tensors as the three that a kernel takes, filled up with the first."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _widths(weights_dO: Sequence[Tensor]) -> list[int]:
    return [*[weight.shape[1] for weight in weights_dO], 0, 0][:3]


def _column_blocks(widths: Sequence[int], block: int) -> int:
    return sum(triton.cdiv(width, block) for width in widths)
