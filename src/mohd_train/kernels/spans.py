"""The GEMMs of the `grouped` backend on sorted tokens (`token_order`): every operand is a view, nothing is gathered.

A span's product is added to the shared product's rows in place; every slice of a weight's gradient is written by one op.
`ends` lie in host memory (`host`): nothing here waits for a device.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, O and F widths; compact tensors [T, K*C], sorted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mohd_train.kernels import token_order

# Where a GEMM on a strided slice of a weight is slower than one on a copy of the slice: a matter of a CPU's caches.
NARROW = 64  # up to this width
NARROW_OUTPUT = 128  # up to this where the slice's columns are the product's
PAGES = 16384  # bytes between a slice's rows at whose multiples they share few sets of the cache, so that a copy is faster too


def _spans(ends: Tensor, sub_dims: int, shared: int, active: int) -> Iterator[tuple[int, int, slice]]:
    """(sub-dimension, slot, its tokens) of every span that holds a token."""
    bounds = [0, *ends.tolist()]
    for choice, slot, first, last in token_order.spans(sub_dims - shared, active - shared):
        if bounds[last + 1] > bounds[first]:
            yield shared + choice, shared + slot, slice(bounds[first], bounds[last + 1])


def _columns(place: int, width: int) -> slice:
    return slice(place * width, (place + 1) * width)


def _narrow(weight: Tensor, width: int) -> bool:
    return weight.is_cpu and width <= NARROW


def up(x_TKC: Tensor, weight_OD: Tensor, ends: Tensor, sub_dims: int, shared: int) -> Tensor:
    """``W x~`` from sorted compact inputs: sorted [T, O]."""
    width = weight_OD.shape[1] // sub_dims
    inner, active = shared * width, x_TKC.shape[1] // width
    out = x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])
    if shared:
        torch.mm(x_TKC[:, :inner], weight_OD[:, :inner].t(), out=out)
    else:
        out.zero_()
    slices: dict[int, Tensor] = {}
    copied = _narrow(weight_OD, width)
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        if i not in slices:
            piece = weight_OD[:, _columns(i, width)]
            slices[i] = piece.contiguous() if copied else piece
        out[rows].addmm_(x_TKC[rows, _columns(slot, width)], slices[i].t())
    return out


def up_backward(
    grad_TO: Tensor,
    x_TKC: Tensor,
    weight_OD: Tensor,
    ends: Tensor,
    sub_dims: int,
    shared: int,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `up`: sorted compact [T, K*C], added in place to `onto` where it is given, and [O, D]."""
    width = weight_OD.shape[1] // sub_dims
    inner, active = shared * width, x_TKC.shape[1] // width
    grad_x = torch.empty(x_TKC.shape, dtype=x_TKC.dtype, device=x_TKC.device) if onto is None else onto
    grad_weight = torch.empty(weight_OD.shape, dtype=weight_OD.dtype, device=weight_OD.device)

    def write(out: Tensor, left: Tensor, right: Tensor) -> None:
        if onto is None:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)

    if shared:
        write(grad_x[:, :inner], grad_TO, weight_OD[:, :inner])
        torch.mm(grad_TO.t(), x_TKC[:, :inner], out=grad_weight[:, :inner])
    narrow, pages_apart = _narrow(weight_OD, width), weight_OD.stride(0) * weight_OD.element_size() % PAGES == 0
    copied = weight_OD.is_cpu and (width <= NARROW_OUTPUT or pages_apart)
    slices: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        columns, x_part, grad_part = _columns(slot, width), x_TKC[rows, _columns(slot, width)], grad_TO[rows]
        if i not in slices:
            piece = weight_OD[:, _columns(i, width)]
            slices[i] = piece.contiguous() if copied else piece
        write(grad_x[rows, columns], grad_part, slices[i])
        if not narrow and i not in sums:
            sums[i] = grad_weight[:, _columns(i, width)].t()
            torch.mm(grad_part.t(), x_part, out=sums[i].t())
        elif not narrow:
            sums[i].t().addmm_(grad_part.t(), x_part)
        elif i not in sums:
            sums[i] = x_part.t() @ grad_part
        else:
            sums[i].addmm_(x_part.t(), grad_part)
    for i in range(shared, sub_dims):
        if i not in sums:
            grad_weight[:, _columns(i, width)].zero_()
        elif narrow:
            grad_weight[:, _columns(i, width)] = sums[i].t()
    return grad_x, grad_weight


def down(
    h_TF: Tensor,
    weight_DF: Tensor,
    ends: Tensor,
    sub_dims: int,
    shared: int,
    active: int,
    tokens_T: Tensor | None = None,
) -> Tensor:
    """The active slices of ``W h``: sorted compact [T, K*C]. `tokens_T` sorts h, where it is not sorted yet."""
    if tokens_T is not None:
        h_TF = h_TF.index_select(0, tokens_T)
    width = weight_DF.shape[0] // sub_dims
    inner = shared * width
    y = h_TF.new_empty(h_TF.shape[0], active * width)
    if shared:
        torch.mm(h_TF, weight_DF[:inner].t(), out=y[:, :inner])
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        torch.mm(h_TF[rows], weight_DF[_columns(i, width)].t(), out=y[rows, _columns(slot, width)])
    return y


def down_backward(
    grad_TKC: Tensor,
    h_TF: Tensor,
    weight_DF: Tensor,
    ends: Tensor,
    sub_dims: int,
    shared: int,
    tokens_T: Tensor | None = None,
    places_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `down`: [T, F] in h's order, and [D, F]. A sorted copy of h is made again rather than kept.

    `places_T` is the inverse of `tokens_T`.
    """
    if tokens_T is not None and places_T is not None:
        sorted_grad, grad_weight = down_backward(
            grad_TKC, h_TF.index_select(0, tokens_T), weight_DF, ends, sub_dims, shared
        )
        return sorted_grad.index_select(0, places_T), grad_weight
    width = weight_DF.shape[0] // sub_dims
    inner, active = shared * width, grad_TKC.shape[1] // width
    grad_h = torch.empty(h_TF.shape, dtype=h_TF.dtype, device=h_TF.device)
    grad_weight = torch.empty(weight_DF.shape, dtype=weight_DF.dtype, device=weight_DF.device)
    if shared:
        torch.mm(grad_TKC[:, :inner], weight_DF[:inner], out=grad_h)
        torch.mm(grad_TKC[:, :inner].t(), h_TF, out=grad_weight[:inner])
    else:
        grad_h.zero_()
    written: set[int] = set()
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        part, of_weight = grad_TKC[rows, _columns(slot, width)], grad_weight[_columns(i, width)]
        grad_h[rows].addmm_(part, weight_DF[_columns(i, width)])
        if i in written:
            of_weight.addmm_(part.t(), h_TF[rows])
        else:
            torch.mm(part.t(), h_TF[rows], out=of_weight)
            written.add(i)
    for i in set(range(shared, sub_dims)) - written:
        grad_weight[_columns(i, width)].zero_()
    return grad_h, grad_weight
