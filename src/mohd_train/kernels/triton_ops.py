"""The `triton` backend as `torch.library` ops with autograd. Not measured on a GPU yet. Shapes as in `triton_kernels`.

The ops keep for the backward pass what their caller keeps anyway: inputs, gate and up, and the scaled output z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mohd_train.kernels import triton_launch as launch
from mohd_train.kernels.grouped_gemm import cast_for_autocast
from mohd_train.kernels.selection import Selection

INTERPRETED = launch.INTERPRETED


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


def _views(weights_OD: Sequence[Tensor]) -> list[Tensor]:
    return [weight.contiguous().t() for weight in weights_OD]  # one launch reads all of them with the same strides


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.t().contiguous() for tensor in tensors]


@torch.library.custom_op("mohd::triton_up", mutates_args=())
def _up(
    x: Tensor, weights: list[Tensor], indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> list[Tensor]:
    return launch.contract(x, _views(weights), indices, tiles)


@torch.library.custom_op("mohd::triton_up_backward", mutates_args=())
def _up_backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor,
    shared: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    views, active = _views(weights), indices.shape[1]
    grad_x = launch.expand(grads, views, indices, tiles, x.shape[1] // active)
    return grad_x, _contiguous(launch.weight_grads(x, grads, views, pairs, ends, shared, active))


@torch.library.custom_op("mohd::triton_down", mutates_args=())
def _down(
    h: Tensor, weight: Tensor, scale: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int,
    sub_dims: int,
) -> Tensor:  # fmt: skip
    return launch.expand([h], [weight.contiguous()], indices, tiles, weight.shape[0] // sub_dims, scale)


@torch.library.custom_op("mohd::triton_down_backward", mutates_args=())
def _down_backward(
    grad: Tensor, z: Tensor, h: Tensor, weight: Tensor, scale: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor,
    ends: Tensor, shared: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weight = weight.contiguous()
    grad_y, grad_scale = launch.scale_grad(grad, z, scale)
    (grad_h,) = launch.contract(grad_y, [weight], indices, tiles)
    (grad_weight,) = launch.weight_grads(grad_y, [h], [weight], pairs, ends, shared, indices.shape[1])
    return grad_h, grad_weight, grad_scale


@torch.library.custom_op("mohd::triton_ffn", mutates_args=())
def _ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, scale: Tensor, indices: Tensor, tiles: Tensor,
    pairs: Tensor, ends: Tensor, shared: int, sub_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gate_view, up_view = _views([w_gate, w_up])
    gate, up, h = launch.swiglu(x, gate_view, up_view, indices, tiles)
    return launch.expand([h], [w_down.contiguous()], indices, tiles, w_down.shape[0] // sub_dims, scale), gate, up


@torch.library.custom_op("mohd::triton_ffn_backward", mutates_args=())
def _ffn_backward(
    grad: Tensor, z: Tensor, gate: Tensor, up: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
    scale: Tensor, indices: Tensor, tiles: Tensor, pairs: Tensor, ends: Tensor, shared: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    views, w_down, active = _views([w_gate, w_up]), w_down.contiguous(), indices.shape[1]
    grad_y, grad_scale = launch.scale_grad(grad, z, scale)
    grad_gate, grad_up, h = launch.swiglu_grad(grad_y, w_down, gate, up, indices, tiles)
    (grad_down,) = launch.weight_grads(grad_y, [h], [w_down], pairs, ends, shared, active)
    grads = [grad_gate, grad_up]
    grad_x = launch.expand(grads, views, indices, tiles, x.shape[1] // active)
    of_gate, of_up = _contiguous(launch.weight_grads(x, grads, views, pairs, ends, shared, active))
    return grad_x, of_gate, of_up, grad_down, grad_scale


@torch.library.custom_op("mohd::triton_fuse", mutates_args=())
def _fuse(
    z: Tensor, mixing: Tensor, residual: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> Tensor:
    return launch.fuse(z, mixing, residual, indices)


@torch.library.custom_op("mohd::triton_fuse_backward", mutates_args=())
def _fuse_backward(
    grad: Tensor, z: Tensor, mixing: Tensor, indices: Tensor, pairs: Tensor, ends: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    return launch.fuse_grads(grad, z, mixing, indices, pairs, ends, shared)


@torch.library.custom_op("mohd::triton_norm_router", mutates_args=())
def _norm_router(x: Tensor, gain: Tensor, centroids: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch.norm_router(x.contiguous(), gain.contiguous(), centroids.contiguous(), eps)


@torch.library.custom_op("mohd::triton_norm_router_backward", mutates_args=())
def _norm_router_backward(
    grad_normed: Tensor, grad_logits: Tensor, x: Tensor, gain: Tensor, centroids: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x.contiguous(), gain.contiguous(), centroids.contiguous())
    return launch.norm_router_grads(grad_normed, grad_logits, *inputs, rstd)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _compact(h: Tensor, weight: Tensor, indices: Tensor, sub_dims: int) -> Tensor:
    return h.new_empty(h.shape[0], indices.shape[1] * (weight.shape[0] // sub_dims))


_up.register_fake(lambda x, weights, *rest: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights])
_down.register_fake(lambda h, weight, scale, indices, *rest: _compact(h, weight, indices, rest[-1]))
_ffn.register_fake(
    lambda x, w_gate, w_up, w_down, scale, indices, *rest: (
        _compact(x, w_down, indices, rest[-1]), *[x.new_empty(x.shape[0], w_gate.shape[0]) for _ in range(2)],
    )
)  # fmt: skip
_fuse.register_fake(lambda z, mixing, residual, *rest: _like(residual)[0])
_norm_router.register_fake(
    lambda x, gain, centroids, eps: (
        x.new_empty(x.shape), x.new_empty(x.shape[0], centroids.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )
)  # fmt: skip
_up_backward.register_fake(lambda grads, x, weights, *rest: (_like(x)[0], list(_like(*weights))))
_down_backward.register_fake(lambda grad, z, h, weight, scale, *rest: _like(h, weight, scale))
_ffn_backward.register_fake(lambda grad, z, gate, up, *rest: _like(*rest[:5]))
_fuse_backward.register_fake(lambda grad, z, mixing, *rest: _like(z, mixing))
_norm_router_backward.register_fake(lambda grad_normed, grad_logits, *rest: _like(*rest[:3]))


def _save_up(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, *chosen, ctx.shared = inputs
    ctx.save_for_backward(x, *chosen, *weights)


def _up_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    grad_x, grad_weights = _up_backward(list(grads), x, saved[4:], *saved[:4], ctx.shared)
    return grad_x, grad_weights, None, None, None, None, None


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:7])
    ctx.shared = inputs[7]


def _down_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_down_backward(grad, *ctx.saved_tensors, ctx.shared), *[None] * 6


def _save_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.shared = inputs[9]


def _ffn_grad(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    return *_ffn_backward(grad, *ctx.saved_tensors, ctx.shared), *[None] * 6


def _save_fusion(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, mixing, _, indices, pairs, ends, ctx.shared = inputs
    ctx.save_for_backward(z, mixing, indices, pairs, ends)


def _fuse_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_fuse_backward(grad, *ctx.saved_tensors, ctx.shared), grad, None, None, None, None


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], output[2])


def _norm_grad(ctx: Any, grad_normed: Tensor, grad_logits: Tensor, unused: Any) -> tuple[Tensor | None, ...]:
    return *_norm_router_backward(grad_normed, grad_logits, *ctx.saved_tensors), None


_up.register_autograd(_up_grad, setup_context=_save_up)
_down.register_autograd(_down_grad, setup_context=_save_down)
_ffn.register_autograd(_ffn_grad, setup_context=_save_ffn)
_fuse.register_autograd(_fuse_grad, setup_context=_save_fusion)
_norm_router.register_autograd(_norm_grad, setup_context=_save_norm)


def up(x_TKC: Tensor, weights_OD: Sequence[Tensor], selection: Selection) -> tuple[Tensor, ...]:
    """``W x~`` from the compact active inputs, one to three weights in one launch: [T, O_i] each."""
    assert len(weights_OD) <= 3
    pairs = [cast_for_autocast(x_TKC, weight) for weight in weights_OD]
    s = selection
    return tuple(_up(pairs[0][0], [w for _, w in pairs], s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared))


def down(h_TF: Tensor, weight_DF: Tensor, selection: Selection, scale_TK: Tensor) -> Tensor:
    """The active slices of ``W h``, slot k times `scale_TK[:, k]`, compact: [T, K*C]."""
    h_TF, weight_DF = cast_for_autocast(h_TF, weight_DF)
    s = selection
    return _down(h_TF, weight_DF, scale_TK, s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared, s.sub_dims)


def ffn(
    x_TKC: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, selection: Selection, scale_TK: Tensor
) -> Tensor:
    """``down(silu(gate x~) * up x~)``, slot k times `scale_TK[:, k]`, compact: [T, K*C]."""
    x, w_gate = cast_for_autocast(x_TKC, w_gate_FD)
    w_up, w_down = (cast_for_autocast(x_TKC, weight)[1] for weight in (w_up_FD, w_down_DF))
    s = selection
    chosen = (s.indices_TK, s.tile_tokens, s.pairs, s.ends, s.shared, s.sub_dims)
    return _ffn(x, w_gate, w_up, w_down, scale_TK, *chosen)[0]


def fuse_residual(z_TKC: Tensor, mixing_NNC: Tensor, selection: Selection, residual_TD: Tensor) -> Tensor:
    """Group fusion and residual from the compact layout, summed in float32: [T, D] in the residual's dtype."""
    s = selection
    return _fuse(z_TKC, mixing_NNC, residual_TD, s.indices_TK, s.pairs, s.ends, s.shared)


def norm_router(x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normalized x [T, D], the router's logits [T, N] in float32, 1 / rms(x) [T] in float32 without a gradient)."""
    normed, logits, rstd = _norm_router(x_TD, gain_D, centroids_ND, eps)
    return normed, logits, rstd.detach()
