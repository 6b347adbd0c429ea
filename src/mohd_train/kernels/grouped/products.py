"""The products of the `grouped` backend: `up`, `down` and `ffn` by the path that the selection names (`choose_path`).

Their GEMMs are `torch.library` ops, opaque to torch.compile, with shapes for fake tensors and with gradients. Decoding calls the
functions behind them directly, which saves the cost of a registered op. Each path's GEMMs are in the module of its name.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, O and F widths.
Compact tensors are [T, K*C]; sorted ones [T, K, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.kernels.grouped import few_tokens, gathered_runs, sorted_spans, token_order
from mohd_train.kernels.norm_router import NormInputs, recompute_active, recompute_active_traced
from mohd_train.kernels.reference import product_dtype
from mohd_train.kernels.selection import Selection, is_eager_inference

# Gathered runs

_up = torch.library.custom_op("mohd::up", gathered_runs.up, mutates_args=())
_up_backward = torch.library.custom_op("mohd::up_backward", gathered_runs.up_backward, mutates_args=())
_down = torch.library.custom_op("mohd::down", gathered_runs.down, mutates_args=())
_down_backward = torch.library.custom_op("mohd::down_backward", gathered_runs.down_backward, mutates_args=())


@_up.register_fake
def _up_shape(x_TKC: Tensor, weight_OD: Tensor, *rest: Any) -> Tensor:
    return x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])


@_down.register_fake
def _down_shape(h_TF: Tensor, weight_DF: Tensor, *rest: Any) -> Tensor:
    sub_dims, _, active = rest[-3:]
    return h_TF.new_empty(h_TF.shape[0], active * (weight_DF.shape[0] // sub_dims))


def _gradient_shapes(grad: Tensor, inputs: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.sizes, ctx.rest = inputs[5:7], (None,) * (len(inputs) - 2)  # N and S


def _gradient_by(backward: Any) -> Any:
    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors, *ctx.sizes), *ctx.rest

    return gradient


_up_backward.register_fake(_gradient_shapes)
_down_backward.register_fake(_gradient_shapes)
_up.register_autograd(_gradient_by(_up_backward), setup_context=_save)
_down.register_autograd(_gradient_by(_down_backward), setup_context=_save)

# Sorted spans, up: all weights in one op, so that the active inputs are recomputed once for all of them


@torch.library.custom_op("mohd::up_sorted", mutates_args=())
def _up_sorted(
    x_TKC: Tensor, weights: list[Tensor], ends: Tensor, recompute: list[Tensor],
    sub_dims: int, shared: int, traced: bool,
) -> list[Tensor]:  # fmt: skip
    """`recompute`: x_TD, rstd_T, norm_weight_D and the rows of `recompute_active`; empty where x_TKC is saved."""
    return [sorted_spans.up(x_TKC.flatten(1), weight, ends, sub_dims, shared) for weight in weights]


@torch.library.custom_op("mohd::up_sorted_backward", mutates_args=())
def _up_sorted_backward(
    grads: list[Tensor], weights: list[Tensor], ends: Tensor, saved: list[Tensor], sub_dims: int, shared: int
) -> tuple[Tensor, list[Tensor]]:
    """`saved`: x_TKC, or the four tensors to recompute it from."""
    x_TKC = saved[0] if len(saved) == 1 else _recompute(recompute_active, saved, sub_dims, weights)
    grad_x, grad_weights = None, []
    for grad, weight in zip(grads, weights, strict=True):
        grad_x, grad_weight = sorted_spans.up_backward(grad, x_TKC.flatten(1), weight, ends, sub_dims, shared, grad_x)
        grad_weights.append(grad_weight)
    assert grad_x is not None
    return grad_x.view(x_TKC.shape), grad_weights


def _recompute(by: Any, saved: list[Tensor], sub_dims: int, weights: list[Tensor]) -> Tensor:
    return by(NormInputs(*saved[:3]), saved[3], sub_dims, weights[0].dtype)


@_up_sorted_backward.register_fake
def _up_sorted_backward_shapes(
    grads: list[Tensor], weights: list[Tensor], ends: Tensor, saved: list[Tensor], sub_dims: int, shared: int
) -> tuple[Tensor, list[Tensor]]:
    tokens, width = saved[0].shape[0], weights[0].shape[1] // sub_dims
    active = saved[0].shape[1] if len(saved) == 1 else saved[3].shape[0] // tokens
    return grads[0].new_empty(tokens, active, width), [weight.new_empty(weight.shape) for weight in weights]


def _save_up_sorted(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_TKC, weights, ends, recompute, *ctx.sizes, ctx.traced = inputs
    ctx.save_for_backward(ends, *weights, *(recompute or [x_TKC]))
    ctx.count, ctx.no_grads = len(weights), [None] * len(recompute)


def _up_sorted_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    ends, *tensors = ctx.saved_tensors
    weights, saved = tensors[: ctx.count], tensors[ctx.count :]
    if ctx.traced and len(saved) > 1:  # outside the op, where the compiler makes one loop of it
        saved = [_recompute(recompute_active_traced, saved, ctx.sizes[0], weights)]
    grad_x, grad_weights = _up_sorted_backward(list(grads), weights, ends, saved, *ctx.sizes)
    return grad_x, grad_weights, None, ctx.no_grads, None, None, None


_up_sorted.register_fake(lambda x, weights, *rest: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights])
_up_sorted.register_autograd(_up_sorted_gradient, setup_context=_save_up_sorted)

# Sorted spans, down


@torch.library.custom_op("mohd::down_sorted", mutates_args=())
def _down_sorted(
    h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int, orders: list[Tensor]
) -> Tensor:
    """`orders`: the order to sort h in and its inverse; empty where h is sorted already."""
    y_TKC = sorted_spans.down(h_TF, weight_DF, ends, sub_dims, shared, active, *orders[:1])
    return y_TKC.view(y_TKC.shape[0], active, -1)


@torch.library.custom_op("mohd::down_sorted_backward", mutates_args=())
def _down_sorted_backward(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int, orders: list[Tensor]
) -> tuple[Tensor, Tensor]:
    return sorted_spans.down_backward(grad_TKC.flatten(1), h_TF, weight_DF, ends, sub_dims, shared, *orders)


def _save_down_sorted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h_TF, weight_DF, ends, sub_dims, shared, _, orders = inputs
    ctx.save_for_backward(h_TF, weight_DF, ends, *orders)
    ctx.sizes, ctx.no_grads = (sub_dims, shared), [None] * len(orders)


def _down_sorted_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    h_TF, weight_DF, ends, *orders = ctx.saved_tensors
    grads = _down_sorted_backward(grad, h_TF, weight_DF, ends, *ctx.sizes, orders)
    return *grads, None, None, None, None, ctx.no_grads


@_down_sorted.register_fake
def _down_sorted_shape(h_TF: Tensor, weight_DF: Tensor, *rest: Any) -> Tensor:
    return _down_shape(h_TF, weight_DF, *rest[:4]).unflatten(1, (rest[3], -1))


_down_sorted_backward.register_fake(_gradient_shapes)
_down_sorted.register_autograd(_down_sorted_gradient, setup_context=_save_down_sorted)

# What `ops` calls


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in autocast's dtype, as `F.linear` does it."""
    return tuple(tensor.to(product_dtype(tensor)) for tensor in tensors)


def up(
    x_TKC: Tensor, weights_OD: Sequence[Tensor], selection: Selection, norm_inputs: NormInputs | None = None
) -> tuple[Tensor, ...]:
    """``W x~`` from the compact active inputs: [T, O_i] each. `norm_inputs`: what they can be recomputed from."""
    x_TKC, order = _sort_inputs(x_TKC, selection), selection.order
    outs = tuple(_up_all(x_TKC, weights_OD, selection, norm_inputs))
    return outs if order is None else tuple(token_order.permute(out, order.positions, order.tokens) for out in outs)


def down(h_TF: Tensor, weight_DF: Tensor, selection: Selection) -> Tensor:
    """The active slices of ``W h``, compact: [T, K*C]."""
    order = selection.order
    if order is None:
        return _down_one(h_TF, weight_DF, selection)
    y_TKC = _down_one(h_TF, weight_DF, selection, (order.tokens, order.positions))
    return token_order.unsort_compact(y_TKC, order)


def ffn(
    x_TKC: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, selection: Selection,
    norm_inputs: NormInputs | None = None,
) -> Tensor:  # fmt: skip
    """``down(silu(gate x~) * up x~)``, compact: [T, K*C]. Sorted tokens stay sorted in between."""
    x_TKC, order = _sort_inputs(x_TKC, selection), selection.order
    gate_TF, up_TF = _up_all(x_TKC, (w_gate_FD, w_up_FD), selection, norm_inputs)
    y_TKC = _down_one(F.silu(gate_TF) * up_TF, w_down_DF, selection)
    return y_TKC if order is None else token_order.unsort_compact(y_TKC, order)


def _sort_inputs(x_TKC: Tensor, s: Selection) -> Tensor:
    return x_TKC if s.order is None else token_order.sort_compact(x_TKC, s.order, s.indices_TK.shape[1])


def _up_all(x_TKC: Tensor, weights_OD: Sequence[Tensor], s: Selection, norm_inputs: NormInputs | None) -> list[Tensor]:
    """Rows as in `x_TKC`, which is sorted and [T, K, C] where the selection has an order."""
    (x_TKC, *weights), sizes = cast_for_autocast(x_TKC, *weights_OD), (s.sub_dims, s.shared)
    if s.choices is not None:
        return [few_tokens.up(x_TKC, weight, s.choices, *sizes) for weight in weights]
    if s.order is not None and is_eager_inference():
        return [sorted_spans.up(x_TKC.flatten(1), weight, s.order.ends, *sizes) for weight in weights]
    if s.order is not None:
        recompute = [] if norm_inputs is None else [*norm_inputs, s.rows.index_select(0, s.order.pairs)]
        return _up_sorted(x_TKC, weights, s.order.ends, recompute, *sizes, torch.compiler.is_compiling())
    assert s.pair_positions_TP is not None
    assert s.host_ends is not None
    run = gathered_runs.up if is_eager_inference() else _up
    return [run(x_TKC, weight, s.pairs, s.pair_positions_TP, s.host_ends, *sizes) for weight in weights]


def _down_one(h_TF: Tensor, weight_DF: Tensor, s: Selection, orders: Sequence[Tensor] = ()) -> Tensor:
    """Compact, or sorted [T, K, C] where the selection has an order. `orders`: as for `mohd::down_sorted`."""
    h_TF, weight_DF = cast_for_autocast(h_TF, weight_DF)
    sizes = (s.sub_dims, s.shared, s.indices_TK.shape[1])
    if s.choices is not None:
        return few_tokens.down(h_TF, weight_DF, s.choices, *sizes)
    if s.order is not None and is_eager_inference():
        return sorted_spans.down(h_TF, weight_DF, s.order.ends, *sizes, *orders[:1]).unflatten(1, (sizes[2], -1))
    if s.order is not None:
        return _down_sorted(h_TF, weight_DF, s.order.ends, *sizes, list(orders))
    assert s.pair_positions_TP is not None
    assert s.host_ends is not None
    run = gathered_runs.down if is_eager_inference() else _down
    return run(h_TF, weight_DF, s.pairs, s.pair_positions_TP, s.host_ends, *sizes)
