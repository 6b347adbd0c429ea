"""The products of the `sorted_spans` path, on sorted tokens (`token_order`): every operand is a view, nothing is gathered.

A span's product is added in place to its rows of the shared product, and one op writes all slices of a weight's gradient.
`ends` are in host memory, so nothing here waits for the device.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, O and F widths.
Compact tensors are [T, K*C], sorted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mohd_train.kernels.grouped import token_order
from mohd_train.kernels.grouped.gathered_runs import is_narrow, part

# On a CPU a GEMM is also faster on a copy of a strided slice than on the slice itself, besides where `is_narrow` says so,
NARROW_OUTPUT = 128  # up to this width, if the product's columns are the slice's
PAGES = 16384  # if the slice's rows are a multiple of this many bytes apart, and so share few sets of the cache


def _spans(ends: Tensor, sub_dims: int, shared: int, active: int) -> Iterator[tuple[int, int, slice]]:
    """(sub-dimension, slot, its tokens) of every span that holds a token."""
    bounds = [0, *ends.tolist()]
    for i, slot, first, last in token_order.spans(sub_dims - shared, active - shared):
        if bounds[last + 1] > bounds[first]:
            yield shared + i, shared + slot, slice(bounds[first], bounds[last + 1])


def up(x_TKC: Tensor, weight_OD: Tensor, ends: Tensor, sub_dims: int, shared: int) -> Tensor:
    """``W x~`` [T, O], sorted, from sorted compact inputs."""
    width = weight_OD.shape[1] // sub_dims
    inner, active = shared * width, x_TKC.shape[1] // width
    out = x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])
    if shared:
        torch.mm(x_TKC[:, :inner], weight_OD[:, :inner].t(), out=out)
    else:
        out.zero_()
    slices: dict[int, Tensor] = {}
    copied = is_narrow(weight_OD, width)
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        if i not in slices:
            weight = weight_OD[:, part(i, width)]
            slices[i] = weight.contiguous() if copied else weight
        out[rows].addmm_(x_TKC[rows, part(slot, width)], slices[i].t())
    return out


def up_backward(
    grad_TO: Tensor, x_TKC: Tensor, weight_OD: Tensor, ends: Tensor, sub_dims: int, shared: int,
    grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `up`: of x sorted compact [T, K*C], of the weight [O, D].

    With `grad_x`, the gradient of x through another weight, that of x through this one is added to it in place.
    """
    width = weight_OD.shape[1] // sub_dims
    inner, active = shared * width, x_TKC.shape[1] // width
    is_first = grad_x is None
    if grad_x is None:
        grad_x = torch.empty(x_TKC.shape, dtype=x_TKC.dtype, device=x_TKC.device)
    grad_weight = torch.empty(weight_OD.shape, dtype=weight_OD.dtype, device=weight_OD.device)

    def write(out: Tensor, left: Tensor, right: Tensor) -> None:
        if is_first:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)

    if shared:
        write(grad_x[:, :inner], grad_TO, weight_OD[:, :inner])
        torch.mm(grad_TO.t(), x_TKC[:, :inner], out=grad_weight[:, :inner])
    narrow, pages_apart = is_narrow(weight_OD, width), weight_OD.stride(0) * weight_OD.element_size() % PAGES == 0
    copied = weight_OD.is_cpu and (width <= NARROW_OUTPUT or pages_apart)
    slices: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        columns, x_part, grad_part = part(slot, width), x_TKC[rows, part(slot, width)], grad_TO[rows]
        if i not in slices:
            weight = weight_OD[:, part(i, width)]
            slices[i] = weight.contiguous() if copied else weight
        write(grad_x[rows, columns], grad_part, slices[i])
        if not narrow and i not in sums:
            sums[i] = grad_weight[:, part(i, width)].t()
            torch.mm(grad_part.t(), x_part, out=sums[i].t())
        elif not narrow:
            sums[i].t().addmm_(grad_part.t(), x_part)
        elif i not in sums:
            sums[i] = x_part.t() @ grad_part
        else:
            sums[i].addmm_(x_part.t(), grad_part)
    for i in range(shared, sub_dims):
        if i not in sums:
            grad_weight[:, part(i, width)].zero_()
        elif narrow:
            grad_weight[:, part(i, width)] = sums[i].t()
    return grad_x, grad_weight


def down(
    h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int,
    tokens_T: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The active slices of ``W h``, sorted compact [T, K*C]. `tokens_T`: the order to sort h in; None: it is sorted already."""
    if tokens_T is not None:
        h_TF = h_TF.index_select(0, tokens_T)
    width = weight_DF.shape[0] // sub_dims
    inner = shared * width
    y = h_TF.new_empty(h_TF.shape[0], active * width)
    if shared:
        torch.mm(h_TF, weight_DF[:inner].t(), out=y[:, :inner])
    for i, slot, rows in _spans(ends, sub_dims, shared, active):
        torch.mm(h_TF[rows], weight_DF[part(i, width)].t(), out=y[rows, part(slot, width)])
    return y


def down_backward(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int,
    tokens_T: Tensor | None = None, positions_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `down`: of h [T, F] in h's order, of the weight [D, F]. The sorted copy of h is recomputed, not saved.

    `positions_T` is the inverse of `tokens_T`.
    """
    if tokens_T is not None and positions_T is not None:
        sorted_grad, grad_weight = down_backward(
            grad_TKC, h_TF.index_select(0, tokens_T), weight_DF, ends, sub_dims, shared
        )
        return sorted_grad.index_select(0, positions_T), grad_weight
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
        grad_part, weight_grad_part = grad_TKC[rows, part(slot, width)], grad_weight[part(i, width)]
        grad_h[rows].addmm_(grad_part, weight_DF[part(i, width)])
        if i in written:
            weight_grad_part.addmm_(grad_part.t(), h_TF[rows])
        else:
            torch.mm(grad_part.t(), h_TF[rows], out=weight_grad_part)
            written.add(i)
    for i in set(range(shared, sub_dims)) - written:
        grad_weight[part(i, width)].zero_()
    return grad_h, grad_weight
