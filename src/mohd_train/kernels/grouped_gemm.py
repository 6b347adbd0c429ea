"""The grouped GEMMs as `torch.library` ops: opaque to torch.compile, with shapes under fake tensors, and with autograd.

Without autograd and outside torch.compile (decoding) they are plain calls: a registered op costs tens of microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mohd_train.kernels import grouped

_up = torch.library.custom_op("mohd::up", grouped.up, mutates_args=())
_up_backward = torch.library.custom_op("mohd::up_backward", grouped.up_backward, mutates_args=())
_down = torch.library.custom_op("mohd::down", grouped.down, mutates_args=())
_down_backward = torch.library.custom_op("mohd::down_backward", grouped.down_backward, mutates_args=())


@_up.register_fake
def _(x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int) -> Tensor:
    return x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])


@_up_backward.register_fake
def _(
    grad_TO: Tensor, x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> tuple[Tensor, Tensor]:
    return x_TKC.new_empty(x_TKC.shape), weight_OD.new_empty(weight_OD.shape)


@_down.register_fake
def _(h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int) -> Tensor:
    return h_TF.new_empty(h_TF.shape[0], active * (weight_DF.shape[0] // sub_dims))


@_down_backward.register_fake
def _(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> tuple[Tensor, Tensor]:
    return h_TF.new_empty(h_TF.shape), weight_DF.new_empty(weight_DF.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:6]  # N and S


def _up_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_up_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


def _down_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_down_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None, None


_up.register_autograd(_up_grad, setup_context=_save)
_down.register_autograd(_down_grad, setup_context=_save)


def _plain() -> bool:
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


def cast_for_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype, as `F.linear` does it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), weight.to(dtype)
    return x, weight


def up(x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int) -> Tensor:
    """See `grouped.up`; differentiable in `x_TKC` and `weight_OD`."""
    x_TKC, weight_OD = cast_for_autocast(x_TKC, weight_OD)
    return (grouped.up if _plain() else _up)(x_TKC, weight_OD, pairs, ends, sub_dims, shared)


def down(
    h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int
) -> Tensor:
    """See `grouped.down`; differentiable in `h_TF` and `weight_DF`."""
    h_TF, weight_DF = cast_for_autocast(h_TF, weight_DF)
    return (grouped.down if _plain() else _down)(h_TF, weight_DF, pairs, ends, sub_dims, shared, active)
