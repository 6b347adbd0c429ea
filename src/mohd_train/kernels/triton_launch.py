"""Launches of the `triton` backend's kernels: grids, block sizes, and their tuning.

On CUDA each kernel times a handful of block sizes at its first call for given widths and keeps the fastest for the process
(`triton.autotune`, applied then, since without a GPU it raises at decoration). The interpreter takes one tiny size.
Other block sizes sum in another order: two processes that chose differently differ in rounding.
Shapes as in `triton_kernels`; a weight seen as [D, O] is a view of one in memory order [D, O] or [O, D], all of a launch alike.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mohd_train.kernels import triton_fusion as fusion_kernels
from mohd_train.kernels import triton_kernels as kernels
from mohd_train.kernels import triton_norm as norm_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRECISION = "ieee"  # float32 products as torch computes them by default; bfloat16 is not affected
KEYS = ("OUT", "OUT0", "OUT1", "OUT2", "N", "D", "K", "C", "COUNT")  # what a choice of block sizes holds for


class Size(NamedTuple):
    """Block sizes of a kernel to choose among: none spills registers where it may be chosen (a test compiles them all)."""

    blocks: dict[str, int]
    warps: int
    stages: int
    capability: int = 80  # the least


# By the tile of the tokens. Two accumulators (SwiGLU), or two more tensors in the epilogue (its gradient), leave room for fewer.
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
SWIGLU_SIZES = {64: TILE_SIZES[64], 128: (Size({"BN": 64, "BK": 32}, 8, 4), Size({"BN": 64, "BK": 64}, 8, 3))}
# Its rows are places of a sub-dimension. A stage more than elsewhere: which rows to read is read first.
WEIGHT_SIZES = (
    Size({"BM": 64, "BN": 64, "BK": 32}, 4, 5), Size({"BM": 64, "BN": 128, "BK": 32}, 8, 5),
    Size({"BM": 64, "BN": 128, "BK": 64}, 8, 4), Size({"BM": 128, "BN": 128, "BK": 32}, 8, 5),
    Size({"BM": 128, "BN": 128, "BK": 64}, 8, 4), Size({"BM": 128, "BN": 256, "BK": 64}, 8, 4, 90),
)  # fmt: skip
ROW_SIZES = (Size({"BT": 16, "BC": 64}, 4, 2), Size({"BT": 32, "BC": 64}, 4, 2), Size({"BT": 16, "BC": 128}, 8, 2))
NORM_SIZES = (Size({"BT": 16, "BD": 64}, 4, 2), Size({"BT": 16, "BD": 128}, 4, 2), Size({"BT": 32, "BD": 128}, 8, 2))


def sizes_of(kernel: Any, tile: int, capability: int) -> list[Size]:
    """What `kernel` may choose among for tokens in tiles of `tile` on a GPU of this capability (80: sm80)."""
    sizes: tuple[Size, ...]
    if kernel is kernels.weight_grad_kernel:
        sizes = WEIGHT_SIZES
    elif kernel in (kernels.swiglu_kernel, kernels.swiglu_grad_kernel):
        sizes = SWIGLU_SIZES[tile]
    elif kernel in (kernels.contract_kernel, kernels.expand_kernel):
        sizes = TILE_SIZES[tile]
    else:
        sizes = ROW_SIZES if "BC" in kernel.arg_names else NORM_SIZES
    return [size for size in sizes if size.capability <= capability]


@functools.cache
def _tuned(kernel: Any, tile: int) -> Any:
    major, minor = torch.cuda.get_device_capability()
    sizes = sizes_of(kernel, tile, 10 * major + minor)
    configs = [triton.Config(size.blocks, num_warps=size.warps, num_stages=size.stages) for size in sizes]
    return triton.autotune(configs, key=[name for name in KEYS if name in kernel.arg_names])(kernel)


def launch(kernel: Any, grid: Callable[[dict[str, Any]], tuple[int, ...]], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` on a grid that follows from the block sizes, tuned on CUDA."""
    if INTERPRETED:
        sizes = dict.fromkeys(sizes_of(kernel, 64, 90)[0].blocks, 16)
        kernel[grid(sizes)](*arguments, **constants, **sizes)
    else:
        _tuned(kernel, constants.get("BM", 0))[grid](*arguments, **constants)


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One to three tensors as the kernels take them: the first again in place of one that is not there."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _widths(weights_dO: Sequence[Tensor]) -> list[int]:
    return [*[weight.shape[1] for weight in weights_dO], 0, 0][:3]


def _column_blocks(widths: Sequence[int], block: int) -> int:
    return sum(triton.cdiv(width, block) for width in widths)


def contract(x_TKC: Tensor, weights_dO: Sequence[Tensor], indices_TK: Tensor, tiles: Tensor) -> list[Tensor]:
    """[T, O_i] for each weight, in one launch, from compact [T, K*C]."""
    active, widths = indices_TK.shape[1], _widths(weights_dO)
    outs = [x_TKC.new_empty(x_TKC.shape[0], weight.shape[1]) for weight in weights_dO]
    launch(
        kernels.contract_kernel,
        lambda meta: (_column_blocks(widths, meta["BN"]), tiles.shape[0]),
        x_TKC.contiguous(), *_three(weights_dO), *_three(outs), tiles, indices_TK, *widths, *weights_dO[0].stride(),
        K=active, C=x_TKC.shape[1] // active, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return outs


def swiglu(x_TKC: Tensor, gate_dF: Tensor, up_dF: Tensor, indices_TK: Tensor, tiles: Tensor) -> list[Tensor]:
    """gate, up and silu(gate) * up [T, F] from compact [T, K*C], in one launch."""
    active = indices_TK.shape[1]
    outs = [x_TKC.new_empty(x_TKC.shape[0], gate_dF.shape[1]) for _ in range(3)]
    launch(
        kernels.swiglu_kernel,
        lambda meta: (triton.cdiv(gate_dF.shape[1], meta["BN"]), tiles.shape[0]),
        x_TKC.contiguous(), gate_dF, up_dF, *outs, tiles, indices_TK, gate_dF.shape[1], *gate_dF.stride(),
        K=active, C=x_TKC.shape[1] // active, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return outs


def swiglu_grad(
    grad_TKC: Tensor, w_dF: Tensor, gate_TF: Tensor, up_TF: Tensor, indices_TK: Tensor, tiles: Tensor
) -> list[Tensor]:
    """Gradients of gate and up, and silu(gate) * up again, from the gradient of the down-projection's output."""
    active, outs = indices_TK.shape[1], [torch.empty_like(gate_TF) for _ in range(3)]
    launch(
        kernels.swiglu_grad_kernel,
        lambda meta: (triton.cdiv(w_dF.shape[1], meta["BN"]), tiles.shape[0]),
        grad_TKC.contiguous(), w_dF, gate_TF, up_TF, *outs, tiles, indices_TK, w_dF.shape[1], *w_dF.stride(),
        K=active, C=grad_TKC.shape[1] // active, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return outs


def expand(
    inputs_TO: Sequence[Tensor],
    weights_dO: Sequence[Tensor],
    indices_TK: Tensor,
    tiles: Tensor,
    width: int,
    scale_TK: Tensor | None = None,
) -> Tensor:
    """Compact [T, K*C], the sum over the weights; slot k times `scale_TK[:, k]`."""
    tokens, active = indices_TK.shape
    out = inputs_TO[0].new_empty(tokens, active * width)
    launch(
        kernels.expand_kernel,
        lambda meta: (active * triton.cdiv(width, meta["BN"]), tiles.shape[0]),
        *_three([part.contiguous() for part in inputs_TO]), *_three(weights_dO),
        out if scale_TK is None else scale_TK.contiguous(), out, tiles, indices_TK,
        *_widths(weights_dO), *weights_dO[0].stride(),
        COUNT=len(weights_dO), SCALED=scale_TK is not None, K=active, C=width, BM=tiles.shape[1], PRECISION=PRECISION,
    )  # fmt: skip
    return out


def weight_grads(
    x_TKC: Tensor, inputs_TO: Sequence[Tensor], like_dO: Sequence[Tensor], pairs: Tensor, ends: Tensor, shared: int,
    active: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of weights seen as [D, O_i], in those weights' memory order, in one launch."""
    grads, width, widths = [torch.empty_like(like) for like in like_dO], x_TKC.shape[1] // active, _widths(like_dO)
    launch(
        kernels.weight_grad_kernel,
        lambda meta: (
            like_dO[0].shape[0] // width, triton.cdiv(width, meta["BM"]), _column_blocks(widths, meta["BN"])
        ),
        x_TKC.contiguous(), *_three([part.contiguous() for part in inputs_TO]), *_three(grads), pairs, ends,
        x_TKC.shape[0], *widths, *grads[0].stride(), K=active, S=shared, C=width, PRECISION=PRECISION,
    )  # fmt: skip
    return grads


def scale_grad(grad_z: Tensor, z_TKC: Tensor, scale_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of y, gradient of the scale [T, K]) of ``z = scale * y``, with y had back from z."""
    grad_y, grad_scale = torch.empty_like(z_TKC), torch.empty_like(scale_TK)
    launch(
        kernels.scale_grad_kernel,
        lambda meta: (triton.cdiv(scale_TK.numel(), meta["BT"]),),
        grad_z.contiguous(), z_TKC, scale_TK.contiguous(), grad_y, grad_scale, scale_TK.numel(),
        C=z_TKC.shape[1] // scale_TK.shape[1],
    )  # fmt: skip
    return grad_y, grad_scale


def fuse(z: Tensor, mixing: Tensor, residual: Tensor, indices: Tensor) -> Tensor:
    """``residual + y'`` [T, D] from compact [T, K*C]; mixing [N, N, C]."""
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    launch(
        fusion_kernels.fuse_kernel,
        lambda meta: (triton.cdiv(tokens, meta["BT"]), sub_dims, triton.cdiv(width, meta["BC"])),
        z.contiguous(), mixing.contiguous(), residual.contiguous(), out, indices, tokens, sub_dims, K=active, C=width,
    )  # fmt: skip
    return out


def fuse_grads(
    grad: Tensor, z: Tensor, mixing: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    """Gradients of z and mixing."""
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    grad, z, mixing = grad.contiguous(), z.contiguous(), mixing.contiguous()
    grad_z, grad_mixing = torch.empty_like(z), torch.empty_like(mixing)
    launch(
        fusion_kernels.fuse_grad_z_kernel,
        lambda meta: (triton.cdiv(tokens, meta["BT"]), active, triton.cdiv(width, meta["BC"])),
        grad, mixing, grad_z, indices, tokens, sub_dims, K=active, C=width,
    )  # fmt: skip
    launch(
        fusion_kernels.fuse_grad_mixing_kernel,
        lambda meta: (sub_dims, sub_dims, triton.cdiv(width, meta["BC"])),
        grad, z, grad_mixing, pairs, ends, tokens, sub_dims, K=active, S=shared, C=width,
    )  # fmt: skip
    return grad_z, grad_mixing


def norm_router(x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed [T, D], logits [T, N] float32, 1 / rms [T] float32)."""
    (tokens, hidden), sub_dims = x_TD.shape, centroids_ND.shape[0]
    normed, rstd = torch.empty_like(x_TD), x_TD.new_empty(tokens, dtype=torch.float32)
    logits = x_TD.new_empty(tokens, sub_dims, dtype=torch.float32)
    launch(
        norm_kernels.norm_router_kernel,
        lambda meta: (triton.cdiv(tokens, meta["BT"]),),
        x_TD, gain_D, centroids_ND, normed, logits, rstd, tokens, hidden, eps, N=sub_dims, NP=_padded(sub_dims),
    )  # fmt: skip
    return normed, logits, rstd


def norm_router_grads(
    grad_normed: Tensor, grad_logits: Tensor, x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gain and centroids."""
    (tokens, hidden), sub_dims = x_TD.shape, centroids_ND.shape[0]
    inputs = (grad_normed.contiguous(), grad_logits.contiguous(), x_TD, gain_D, centroids_ND, rstd_T)
    grad_x, constants = torch.empty_like(x_TD), {"N": sub_dims, "NP": _padded(sub_dims)}
    launch(
        norm_kernels.norm_router_grad_x_kernel,
        lambda meta: (triton.cdiv(tokens, meta["BT"]),),
        *inputs, grad_x, tokens, hidden, **constants,
    )  # fmt: skip
    parts = (
        1 if INTERPRETED else min(16, triton.cdiv(tokens, 512))
    )  # partial sums over tokens, so that the grid fills a GPU
    grad_gain = x_TD.new_empty(parts, hidden, dtype=torch.float32)
    grad_centroids = x_TD.new_empty(parts, sub_dims, hidden, dtype=torch.float32)
    launch(
        norm_kernels.norm_router_grad_weights_kernel,
        lambda meta: (triton.cdiv(hidden, meta["BD"]), parts),
        *inputs, grad_gain, grad_centroids, tokens, hidden, triton.cdiv(tokens, parts), **constants,
    )  # fmt: skip
    return grad_x, grad_gain.sum(0).to(gain_D.dtype), grad_centroids.sum(0).to(centroids_ND.dtype)


def _padded(sub_dims: int) -> int:
    return max(16, triton.next_power_of_2(sub_dims))  # tl.dot takes no fewer
