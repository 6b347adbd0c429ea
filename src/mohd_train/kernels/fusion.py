"""Group fusion and residual of the `grouped` backend, from the compact layout (eqs. 9, 17).

For torch.compile each step is written as pointwise reads and sums, which become one loop; eager code works in blocks of tokens
that stay in cache.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N. `mixing` here is [N (from), N (to), C]:
B_j[i, n] = mixing[n, i, j], so that every step runs along the contiguous dim j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mohd_train.kernels.grouped.gathered_runs import runs
from mohd_train.kernels.reference import cast
from mohd_train.kernels.selection import TILE, Selection, tiles

BLOCK_ELEMENTS = 1 << 17  # a block on a CPU: half a megabyte of float32, within a core's second-level cache
GPU_BLOCK_ELEMENTS = 1 << 25  # a block on a GPU: 128 MiB of float32, for few launches
# Adjacent tokens in a partial sum. A sum over gathered tokens takes fewer (TILE), as each is another stream to read.
SUMMED = 16


def fuse_residual(z_TKC: Tensor, mixing_NNC: Tensor, selection: Selection, residual: Tensor) -> Tensor:
    """``residual + y'``, y'_{i,j} = sum_k mixing[idx_k, i, j] z_{k,j}. Returns [T, D] in the residual's dtype."""
    s = selection
    if not torch.is_grad_enabled():  # saves decoding the cost of autograd's bookkeeping
        return _forward(z_TKC, mixing_NNC, s.indices_TK, s.shared, residual)
    # Traced code sums in tiles, with the ends on the device; blocks need them on the host
    ends = s.ends if torch.compiler.is_compiling() else s.host_ends
    return _Fuse.apply(z_TKC, mixing_NNC, residual, s.indices_TK, s.pairs, ends, s.shared)


def _forward(z: Tensor, mixing: Tensor, indices: Tensor, shared: int, residual: Tensor) -> Tensor:
    run = _fuse_traced if torch.compiler.is_compiling() else _fuse_blocks
    return run(z, mixing, indices, shared, residual)


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mixing: Tensor, residual: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
    ) -> Tensor:
        ctx.save_for_backward(z, mixing, indices, pairs, ends)
        ctx.shared = shared
        return _forward(z, mixing, indices, shared, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_traced if torch.compiler.is_compiling() else _backward_blocks
        z, mixing, indices, pairs, ends = ctx.saved_tensors
        # torch.compile traces this in the forward pass's autocast region, where eager autograd runs it outside of it
        with torch.autocast(grad.device.type, enabled=False):
            grad_z, grad_mixing = run(grad, z, mixing, indices, pairs, ends, ctx.shared)
        return grad_z, grad_mixing, grad, None, None, None, None


def _fuse_traced(z: Tensor, mixing: Tensor, indices: Tensor, shared: int, residual: Tensor) -> Tensor:
    tokens, active = indices.shape
    dtype = torch.promote_types(z.dtype, mixing.dtype)
    out = residual.to(dtype).reshape(tokens, mixing.shape[0], -1)
    z, mixing = z.reshape(tokens, active, 1, -1).to(dtype), mixing.to(dtype)
    for k in range(active):
        out = out + (mixing[k] if k < shared else mixing[indices[:, k]]) * z[:, k]
    return cast(out.flatten(1), residual.dtype)


def _backward_traced(
    grad: Tensor, z: Tensor, mixing: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    dtype = torch.promote_types(z.dtype, mixing.dtype)
    grad = grad.reshape(tokens, sub_dims, width).to(dtype)
    wide = mixing.to(dtype)
    slots = [(grad * (wide[k] if k < shared else wide[indices[:, k]])).sum(1) for k in range(active)]
    grad_z = torch.cat(slots, 1).to(z.dtype)
    z = z.reshape(tokens, active, width).to(dtype)
    sums = []
    if shared:
        sums.append(_outer_sum(grad, z[:, :shared]))
    if sub_dims > shared:
        sums.append(_outer_sum_runs(grad, z.view(-1, width), pairs, ends, active))
    return grad_z, torch.cat(sums).to(mixing.dtype)


def _outer_sum(grad_TNC: Tensor, z_TSC: Tensor) -> Tensor:
    """sum_t z[t, s, j] grad[t, n, j]: [S, N, C], by partial sums of SUMMED tokens, which stay in cache."""
    (tokens, sub_dims, width), slots = grad_TNC.shape, z_TSC.shape[1]
    count = tokens // SUMMED
    full = count * SUMMED
    sums = []
    if count:
        grad = grad_TNC[:full].reshape(count, SUMMED, 1, sub_dims, width)
        sums.append((grad * z_TSC[:full].reshape(count, SUMMED, slots, 1, width)).sum(1).sum(0))
    if full < tokens or not count:  # an empty slice would save all of z for the backward pass
        sums.append((grad_TNC[full:].unsqueeze(1) * z_TSC[full:].unsqueeze(2)).sum(0))
    return sums[0] if len(sums) == 1 else sums[0] + sums[1]


def _outer_sum_runs(grad_TNC: Tensor, z_rows: Tensor, pairs: Tensor, ends: Tensor, active: int) -> Tensor:
    """As `_outer_sum`, over the tokens that chose each specialized sub-dimension: [N-S, N, C]."""
    (_, sub_dims, width), specialized = grad_TNC.shape, ends.shape[0]
    if pairs.shape[0] == 0:
        return grad_TNC.new_zeros(specialized, sub_dims, width)
    tile_pairs, tile_runs = tiles(pairs, ends)
    flat = tile_pairs.clamp(min=0).view(-1)
    z = z_rows.index_select(0, flat).view(-1, TILE, 1, width)
    z = torch.where(tile_pairs.view(-1, TILE, 1, 1) >= 0, z, 0)
    partial = (grad_TNC.index_select(0, flat // active).view(-1, TILE, sub_dims, width) * z).sum(1)
    onehot = (tile_runs == torch.arange(specialized, device=tile_runs.device).unsqueeze(1)).to(partial.dtype)
    return (onehot @ partial.flatten(1)).view(specialized, sub_dims, width)


def _fuse_blocks(z: Tensor, mixing: Tensor, indices: Tensor, shared: int, residual: Tensor) -> Tensor:
    tokens, active = indices.shape
    dtype = torch.promote_types(z.dtype, mixing.dtype)
    out = residual.to(dtype, copy=True, memory_format=torch.contiguous_format)
    out_TNC, mixing = out.view(tokens, mixing.shape[0], -1), mixing.to(dtype)
    z = z.reshape(tokens, active, 1, -1)
    for start, stop in blocks(tokens, out.shape[1], out.device):
        block, part = out_TNC[start:stop], z[start:stop].to(dtype)
        for k in range(active):
            row = mixing[k] if k < shared else mixing.index_select(0, indices[start:stop, k])
            block.addcmul_(row, part[:, k])
    return cast(out, residual.dtype)


def _backward_blocks(
    grad: Tensor, z: Tensor, mixing: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    dtype = torch.promote_types(z.dtype, mixing.dtype)
    grad, wide, z_rows = grad.reshape(tokens, sub_dims, width), mixing.to(dtype), z.reshape(-1, width)
    grad_z, grad_mixing = z.new_empty(tokens, active, width), torch.zeros_like(wide)
    z_TK = z_rows.view(tokens, active, 1, width)
    for start, stop in blocks(tokens, sub_dims * width, grad.device):
        block, part = grad[start:stop].to(dtype), z_TK[start:stop].to(dtype)
        buffer = torch.empty_like(block)
        for k in range(shared):
            grad_z[start:stop, k] = torch.mul(block, wide[k], out=buffer).sum(1)
            grad_mixing[k] += torch.mul(block, part[:, k], out=buffer).sum(0)
        for k in range(shared, active):
            grad_z[start:stop, k] = wide.index_select(0, indices[start:stop, k]).mul_(block).sum(1)
    for i, run in runs(ends, shared):
        for start, stop in blocks(run.stop - run.start, sub_dims * width, grad.device):
            chosen = pairs[run][start:stop]
            block = grad.index_select(0, chosen // active).to(dtype)
            grad_mixing[i] += block.mul_(z_rows.index_select(0, chosen).unsqueeze(1)).sum(0)
    return grad_z.view_as(z), grad_mixing.to(mixing.dtype)


def blocks(rows: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """(start, stop) of blocks of rows of this width: small enough for a CPU's cache, large on a GPU."""
    step = max(1, (BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS) // width)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
