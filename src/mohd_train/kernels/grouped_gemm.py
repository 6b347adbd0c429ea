"""The grouped GEMMs as `torch.library` ops: opaque to torch.compile, with shapes under fake tensors, and with autograd.

`selection.choose_path` says which: `few_tokens`, `spans` on sorted tokens, or `grouped` on gathered runs.
Without autograd and outside torch.compile (decoding) they are plain calls: a registered op costs tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.kernels import few_tokens, grouped, spans, token_order
from mohd_train.kernels.selection import Selection
from mohd_train.kernels.source import Source, active_inputs, active_inputs_traced

_up = torch.library.custom_op("mohd::up", grouped.up, mutates_args=())
_up_backward = torch.library.custom_op("mohd::up_backward", grouped.up_backward, mutates_args=())
_down = torch.library.custom_op("mohd::down", grouped.down, mutates_args=())
_down_backward = torch.library.custom_op("mohd::down_backward", grouped.down_backward, mutates_args=())


@torch.library.custom_op("mohd::up_sorted", mutates_args=())
def _up_sorted(
    x_TKC: Tensor, weights: list[Tensor], ends: Tensor, source: list[Tensor], sub_dims: int, shared: int, traced: bool
) -> list[Tensor]:
    return [spans.up(x_TKC.flatten(1), weight, ends, sub_dims, shared) for weight in weights]


@torch.library.custom_op("mohd::up_sorted_backward", mutates_args=())
def _up_sorted_backward(
    grads: list[Tensor], weights: list[Tensor], ends: Tensor, kept: list[Tensor], sub_dims: int, shared: int
) -> tuple[Tensor, list[Tensor]]:
    """`kept`: x_TKC, or x_TD, rstd_T, gain_D and the rows to make it of again."""
    x_TKC = kept[0] if len(kept) == 1 else active_inputs(Source(*kept[:3]), kept[3], sub_dims, weights[0].dtype)
    grad_x, grad_weights = None, []
    for grad, weight in zip(grads, weights, strict=True):
        grad_x, grad_weight = spans.up_backward(grad, x_TKC.flatten(1), weight, ends, sub_dims, shared, grad_x)
        grad_weights.append(grad_weight)
    assert grad_x is not None
    return grad_x.view(x_TKC.shape), grad_weights


def _up_sorted_shapes(
    grads: list[Tensor], weights: list[Tensor], ends: Tensor, kept: list[Tensor], sub_dims: int, shared: int
) -> tuple[Tensor, list[Tensor]]:
    tokens, width = kept[0].shape[0], weights[0].shape[1] // sub_dims
    active = kept[0].shape[1] if len(kept) == 1 else kept[3].shape[0] // tokens
    return grads[0].new_empty(tokens, active, width), [weight.new_empty(weight.shape) for weight in weights]


def _save_up_sorted(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_TKC, weights, ends, source, *ctx.sizes, ctx.traced = inputs
    ctx.save_for_backward(ends, *weights, *(source or [x_TKC]))
    ctx.count, ctx.no_grads = len(weights), [None] * len(source)


def _up_sorted_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    ends, *saved = ctx.saved_tensors
    weights, kept = saved[: ctx.count], saved[ctx.count :]
    if ctx.traced and len(kept) > 1:  # where the compiler sees it, it is one loop
        kept = [active_inputs_traced(Source(*kept[:3]), kept[3], ctx.sizes[0], weights[0].dtype)]
    grad_x, grad_weights = _up_sorted_backward(list(grads), weights, ends, kept, *ctx.sizes)
    return grad_x, grad_weights, None, ctx.no_grads, None, None, None


_up_sorted.register_fake(lambda x, weights, *rest: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights])
_up_sorted_backward.register_fake(_up_sorted_shapes)
_up_sorted.register_autograd(_up_sorted_gradient, setup_context=_save_up_sorted)


@torch.library.custom_op("mohd::down_sorted", mutates_args=())
def _down_sorted(
    h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int, orders: list[Tensor]
) -> Tensor:
    """`orders`: nothing where h is sorted, else the tokens' order and its inverse."""
    y_TKC = spans.down(h_TF, weight_DF, ends, sub_dims, shared, active, *orders[:1])
    return y_TKC.view(y_TKC.shape[0], active, -1)


@torch.library.custom_op("mohd::down_sorted_backward", mutates_args=())
def _down_sorted_backward(
    grad_TKC: Tensor,
    h_TF: Tensor,
    weight_DF: Tensor,
    ends: Tensor,
    sub_dims: int,
    shared: int,
    orders: list[Tensor],
) -> tuple[Tensor, Tensor]:
    return spans.down_backward(grad_TKC.flatten(1), h_TF, weight_DF, ends, sub_dims, shared, *orders)


def _up_shape(x_TKC: Tensor, weight_OD: Tensor, *rest: Any) -> Tensor:
    return x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])


def _down_shape(h_TF: Tensor, weight_DF: Tensor, *rest: Any) -> Tensor:
    sub_dims, _, active = rest[-3:]
    return h_TF.new_empty(h_TF.shape[0], active * (weight_DF.shape[0] // sub_dims))


def _down_sorted_shape(h_TF: Tensor, weight_DF: Tensor, *rest: Any) -> Tensor:
    return _down_shape(h_TF, weight_DF, *rest[:4]).unflatten(1, (rest[3], -1))


def _gradient_shapes(grad: Tensor, inputs: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.sizes, ctx.rest = inputs[5:7], (None,) * (len(inputs) - 2)  # N and S


def _save_down_sorted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h_TF, weight_DF, ends, sub_dims, shared, _, orders = inputs
    ctx.save_for_backward(h_TF, weight_DF, ends, *orders)
    ctx.sizes, ctx.no_grads = (sub_dims, shared), [None] * len(orders)


def _down_sorted_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h_TF, weight_DF, ends, *orders = ctx.saved_tensors
    grads = _down_sorted_backward(grad, h_TF, weight_DF, ends, *ctx.sizes, orders)
    return *grads, None, None, None, None, ctx.no_grads


def _gradient_by(backward: Any) -> Any:
    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors, *ctx.sizes), *ctx.rest

    return gradient


for _forward, _backward, _shape, _keep in (
    (_up, _up_backward, _up_shape, _save),
    (_down, _down_backward, _down_shape, _save),
):
    _forward.register_fake(_shape)
    _backward.register_fake(_gradient_shapes)
    _forward.register_autograd(_gradient_by(_backward), setup_context=_keep)

_down_sorted.register_fake(_down_sorted_shape)
_down_sorted_backward.register_fake(_gradient_shapes)
_down_sorted.register_autograd(_down_sorted_gradient, setup_context=_save_down_sorted)


def _plain() -> bool:
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


def cast_for_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype, as `F.linear` does it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), weight.to(dtype)
    return x, weight


def _up_all(x_TKC: Tensor, weights_OD: Sequence[Tensor], s: Selection, source: Source | None) -> list[Tensor]:
    """Rows as in `x_TKC`, which is sorted and [T, K, C] where the selection has an order."""
    weights = [cast_for_autocast(x_TKC, weight)[1] for weight in weights_OD]
    x_TKC, sizes = cast_for_autocast(x_TKC, weights_OD[0])[0], (s.sub_dims, s.shared)
    if s.choices is not None:
        return [few_tokens.up(x_TKC, weight, s.choices, *sizes) for weight in weights]
    if s.order is not None and _plain():
        return [spans.up(x_TKC.flatten(1), weight, s.order.ends, *sizes) for weight in weights]
    if s.order is not None:
        kept = [] if source is None else [*source, s.rows.index_select(0, s.order.pairs)]
        return _up_sorted(x_TKC, weights, s.order.ends, kept, *sizes, torch.compiler.is_compiling())
    assert s.pair_places_TP is not None
    assert s.host_ends is not None
    run = grouped.up if _plain() else _up
    return [run(x_TKC, weight, s.pairs, s.pair_places_TP, s.host_ends, *sizes) for weight in weights]


def _down_one(h_TF: Tensor, weight_DF: Tensor, s: Selection, orders: Sequence[Tensor] = ()) -> Tensor:
    """Compact [T, K*C], but sorted and [T, K, C] where the selection has an order. `orders`: the order to bring h into, and its
    inverse; none where h is sorted."""
    h_TF, weight_DF = cast_for_autocast(h_TF, weight_DF)
    sizes = (s.sub_dims, s.shared, s.indices_TK.shape[1])
    if s.choices is not None:
        return few_tokens.down(h_TF, weight_DF, s.choices, *sizes)
    if s.order is not None and _plain():
        return spans.down(h_TF, weight_DF, s.order.ends, *sizes, *orders[:1]).unflatten(1, (sizes[2], -1))
    if s.order is not None:
        return _down_sorted(h_TF, weight_DF, s.order.ends, *sizes, list(orders))
    assert s.pair_places_TP is not None
    assert s.host_ends is not None
    run = grouped.down if _plain() else _down
    return run(h_TF, weight_DF, s.pairs, s.pair_places_TP, s.host_ends, *sizes)


def _sorted_inputs(x_TKC: Tensor, s: Selection) -> Tensor:
    return x_TKC if s.order is None else token_order.sort_compact(x_TKC, s.order, s.indices_TK.shape[1])


def up(
    x_TKC: Tensor, weights_OD: Sequence[Tensor], selection: Selection, source: Source | None = None
) -> tuple[Tensor, ...]:
    """``W x~`` from the compact active inputs: [T, O_i] each. `source` is what they can be made of again."""
    x_TKC, order = _sorted_inputs(x_TKC, selection), selection.order
    outs = tuple(_up_all(x_TKC, weights_OD, selection, source))
    return outs if order is None else tuple(token_order.permute(out, order.places, order.tokens) for out in outs)


def down(h_TF: Tensor, weight_DF: Tensor, selection: Selection) -> Tensor:
    """The active slices of ``W h``, compact: [T, K*C]."""
    order = selection.order
    if order is None:
        return _down_one(h_TF, weight_DF, selection)
    y_TKC = _down_one(h_TF, weight_DF, selection, (order.tokens, order.places))
    return token_order.unsort_compact(y_TKC, order)


def ffn(
    x_TKC: Tensor,
    w_gate_FD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    selection: Selection,
    source: Source | None = None,
) -> Tensor:
    """``down(silu(gate x~) * up x~)``, compact: [T, K*C]. Sorted tokens stay sorted in between. `source` as for `up`."""
    x_TKC, order = _sorted_inputs(x_TKC, selection), selection.order
    gate_TF, up_TF = _up_all(x_TKC, (w_gate_FD, w_up_FD), selection, source)
    y_TKC = _down_one(F.silu(gate_TF) * up_TF, w_down_DF, selection)
    return y_TKC if order is None else token_order.unsort_compact(y_TKC, order)
