"""The `triton` backend: launches of the kernels, as `torch.library` ops with autograd. Not measured on a GPU yet.

Block sizes are fixed; tuning them per device waits for one. Shapes as in `triton_kernels`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
from torch import Tensor

from mohd_train.kernels import triton_kernels as kernels
from mohd_train.kernels.grouped_gemm import cast_for_autocast
from mohd_train.kernels.selection import Selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BN, BK = (16, 16) if INTERPRETED else (64, 32)  # output columns, length of a step of the K-loop
BT, BC = (16, 16) if INTERPRETED else (16, 64)  # the fusion's tokens and places
PRECISION = "ieee"  # float32 products as torch computes them by default; bfloat16 is not affected


def refusal(device: torch.device, dtype: torch.dtype, width: int | None) -> str | None:
    """Why the kernels can't run there, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton kernels need a CUDA device, not {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton kernels need compute capability 8.0 (A100) or newer"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the triton kernels have no {str(dtype).removeprefix('torch.')}"
    if width is not None and not INTERPRETED and (width % 32 or not 64 <= width <= 512):
        return f"the triton kernels serve sub-dimension widths 64 to 512 in steps of 32, not {width}"
    return None


def _contract(x_TKC: Tensor, w_dO: Tensor, indices_TK: Tensor, tile_tokens: Tensor, width: int) -> Tensor:
    """[T, O] from compact [T, K*C] and a weight seen as [D, O]."""
    active, out = indices_TK.shape[1], x_TKC.new_empty(x_TKC.shape[0], w_dO.shape[1])
    grid = (tile_tokens.shape[0], triton.cdiv(w_dO.shape[1], BN))
    kernels.contract_kernel[grid](
        x_TKC.contiguous(), w_dO, out, tile_tokens, indices_TK, w_dO.shape[1], w_dO.stride(0), w_dO.stride(1),
        active, width, tile_tokens.shape[1], BN, BK, PRECISION,
    )  # fmt: skip
    return out


def _expand(h_TO: Tensor, w_dO: Tensor, indices_TK: Tensor, tile_tokens: Tensor, width: int) -> Tensor:
    """Compact [T, K*C] from [T, O] and a weight seen as [D, O]."""
    active = indices_TK.shape[1]
    out = h_TO.new_empty(h_TO.shape[0], active * width)
    grid = (tile_tokens.shape[0], active * triton.cdiv(width, BN))
    kernels.expand_kernel[grid](
        h_TO.contiguous(), w_dO, out, tile_tokens, indices_TK, w_dO.shape[1], w_dO.stride(0), w_dO.stride(1),
        active, width, tile_tokens.shape[1], BN, BK, PRECISION,
    )  # fmt: skip
    return out


def _weight_grad(
    x_TKC: Tensor, h_TO: Tensor, like_dO: Tensor, pairs: Tensor, ends: Tensor, shared: int, active: int
) -> Tensor:
    """Gradient of a weight seen as [D, O], in that weight's memory order."""
    grad, width = torch.empty_like(like_dO), x_TKC.shape[1] // active
    grid = (like_dO.shape[0] // width, triton.cdiv(width, BN), triton.cdiv(like_dO.shape[1], BN))
    kernels.weight_grad_kernel[grid](
        x_TKC.contiguous(), h_TO.contiguous(), grad, pairs, ends, h_TO.shape[0], h_TO.shape[1],
        grad.stride(0), grad.stride(1), active, shared, width, BN, BN, BK, PRECISION,
    )  # fmt: skip
    return grad


@torch.library.custom_op("mohd::triton_up", mutates_args=())
def _up(x: Tensor, weight: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int) -> Tensor:
    return _contract(x, weight.t(), indices, tiles, x.shape[1] // indices.shape[1])


@torch.library.custom_op("mohd::triton_up_backward", mutates_args=())
def _up_backward(
    grad: Tensor, x: Tensor, weight: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    active = indices.shape[1]
    grad_x = _expand(grad, weight.t(), indices, tiles, x.shape[1] // active)
    return grad_x, _weight_grad(x, grad, weight.t(), pairs, ends, shared, active).t().contiguous()


@torch.library.custom_op("mohd::triton_down", mutates_args=())
def _down(
    h: Tensor, weight: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int, sub_dims: int
) -> Tensor:
    return _expand(h, weight, indices, tiles, weight.shape[0] // sub_dims)


@torch.library.custom_op("mohd::triton_down_backward", mutates_args=())
def _down_backward(
    grad: Tensor, h: Tensor, weight: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    active = indices.shape[1]
    grad_h = _contract(grad, weight, indices, tiles, grad.shape[1] // active)
    return grad_h, _weight_grad(grad, h, weight, pairs, ends, shared, active).contiguous()


@torch.library.custom_op("mohd::triton_fuse", mutates_args=())
def _fuse(
    z: Tensor, mixing: Tensor, residual: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> Tensor:
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    kernels.fuse_kernel[(triton.cdiv(tokens, BT), sub_dims, triton.cdiv(width, BC))](
        z.contiguous(), mixing.contiguous(), residual.contiguous(), out, indices, tokens, sub_dims, active, width, BT, BC
    )  # fmt: skip
    return out


@torch.library.custom_op("mohd::triton_fuse_backward", mutates_args=())
def _fuse_backward(
    grad: Tensor, z: Tensor, mixing: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    (tokens, active), (sub_dims, _, width) = indices.shape, mixing.shape
    grad, z, mixing = grad.contiguous(), z.contiguous(), mixing.contiguous()
    grad_z, grad_mixing, places = torch.empty_like(z), torch.empty_like(mixing), triton.cdiv(width, BC)
    kernels.fuse_grad_z_kernel[(triton.cdiv(tokens, BT), active, places)](
        grad, mixing, grad_z, indices, tokens, sub_dims, active, width, BT, BC
    )  # fmt: skip
    kernels.fuse_grad_mixing_kernel[(sub_dims, sub_dims, places)](
        grad, z, grad_mixing, pairs, ends, tokens, sub_dims, active, shared, width, BT, BC
    )  # fmt: skip
    return grad_z, grad_mixing


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


_up.register_fake(lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]))
_down.register_fake(
    lambda h, weight, indices, *rest: h.new_empty(h.shape[0], indices.shape[1] * (weight.shape[0] // rest[-1]))
)
_fuse.register_fake(lambda z, mixing, residual, *rest: _like(residual)[0])
_up_backward.register_fake(lambda grad, x, weight, *rest: _like(x, weight))
_down_backward.register_fake(lambda grad, h, weight, *rest: _like(h, weight))
_fuse_backward.register_fake(lambda grad, z, mixing, *rest: _like(z, mixing))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.shared, ctx.rest = inputs[6], (None,) * (len(inputs) - 2)


def _save_fusion(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, mixing, _, indices, pairs, ends, ctx.shared = inputs
    ctx.save_for_backward(z, mixing, indices, pairs, ends)


def _up_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_up_backward(grad, *ctx.saved_tensors, ctx.shared), *ctx.rest


def _down_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_down_backward(grad, *ctx.saved_tensors, ctx.shared), *ctx.rest


def _fuse_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_fuse_backward(grad, *ctx.saved_tensors, ctx.shared), grad, None, None, None, None


_up.register_autograd(_up_grad, setup_context=_save)
_down.register_autograd(_down_grad, setup_context=_save)
_fuse.register_autograd(_fuse_grad, setup_context=_save_fusion)


def up(x_TKC: Tensor, weight_OD: Tensor, selection: Selection) -> Tensor:
    """``W x~`` from the compact active inputs: [T, O]."""
    x_TKC, weight_OD = cast_for_autocast(x_TKC, weight_OD)
    s = selection
    return _up(x_TKC, weight_OD, s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared)


def down(h_TF: Tensor, weight_DF: Tensor, selection: Selection) -> Tensor:
    """The active slices of ``W h``, compact: [T, K*C]."""
    h_TF, weight_DF = cast_for_autocast(h_TF, weight_DF)
    s = selection
    return _down(h_TF, weight_DF, s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared, s.sub_dims)


def fuse_residual(z_TKC: Tensor, mixing_NNC: Tensor, selection: Selection, residual_TD: Tensor) -> Tensor:
    """Group fusion and residual from the compact layout, summed in float32: [T, D] in the residual's dtype."""
    s = selection
    return _fuse(z_TKC, mixing_NNC, residual_TD, s.indices_TK, s.pairs, s.ends, s.shared)
