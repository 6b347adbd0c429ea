"""The GEMMs of the `grouped` backend: shared sub-dimensions in one GEMM over all tokens, specialized ones in a GEMM a run.

Tokens keep their order. A run's rows are gathered, multiplied and added back, while they are in cache; every slice of a weight's
gradient is written in place by one op, since autograd would fill a full-size zero tensor for each slice.
Host sync: none on CPU. On CUDA the first op of a selection reads the run ends, as `torch.mm` takes sizes from the host (`host`).

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, O and F widths. A compact tensor is [T, K*C].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mohd_train.kernels.host import ends_on_host

NARROW = 64  # up to this width a CPU is slower on a strided slice of a weight than on a copy of the slice


def runs(pairs: Tensor, ends: Tensor, shared: int) -> Iterator[tuple[int, Tensor]]:
    """(sub-dimension, its pairs) for every specialized sub-dimension that some token chose."""
    start = 0
    for place, end in enumerate(ends_on_host(ends)):
        if end > start:
            yield shared + place, pairs[start:end]
        start = end


def up(x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int) -> Tensor:
    """``W x~`` from the compact active inputs. Returns [T, O]."""
    width = weight_OD.shape[1] // sub_dims
    inner, x_rows = shared * width, x_TKC.reshape(-1, width)
    active = x_TKC.shape[1] // width
    out_TO = x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])
    if shared:
        torch.mm(x_TKC[:, :inner], weight_OD[:, :inner].t(), out=out_TO)
    else:
        out_TO.zero_()
    for i, pair in runs(pairs, ends, shared):
        part = x_rows.index_select(0, pair) @ weight_OD[:, i * width : (i + 1) * width].t()
        out_TO.index_add_(0, pair // active, part)
    return out_TO


def up_backward(
    grad_TO: Tensor, x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `up`: compact [T, K*C], and [O, D]."""
    width = weight_OD.shape[1] // sub_dims
    inner, x_rows = shared * width, x_TKC.reshape(-1, width)
    active = x_TKC.shape[1] // width
    grad_x = torch.empty(x_TKC.shape, dtype=x_TKC.dtype, device=x_TKC.device)
    grad_rows, grad_weight = grad_x.view(-1, width), _slices(weight_OD, ends, shared, sub_dims, columns=True)
    if shared:
        torch.mm(grad_TO, weight_OD[:, :inner], out=grad_x[:, :inner])
        torch.mm(grad_TO.t(), x_TKC[:, :inner], out=grad_weight[:, :inner])
    for i, pair in runs(pairs, ends, shared):
        part, columns = grad_TO.index_select(0, pair // active), slice(i * width, (i + 1) * width)
        piece, x_part = weight_OD[:, columns], x_rows.index_select(0, pair)
        if width <= NARROW and weight_OD.is_cpu:
            grad_rows.index_copy_(0, pair, part @ piece.contiguous())
            grad_weight[:, columns] = (x_part.t() @ part).t()
        else:
            grad_rows.index_copy_(0, pair, part @ piece)
            torch.mm(part.t(), x_part, out=grad_weight[:, columns])
    return grad_x, grad_weight


def down(
    h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int
) -> Tensor:
    """The active slices of ``W h``, compact: [T, K*C]."""
    width = weight_DF.shape[0] // sub_dims
    inner = shared * width
    y_TKC = h_TF.new_empty(h_TF.shape[0], active * width)
    if shared:
        torch.mm(h_TF, weight_DF[:inner].t(), out=y_TKC[:, :inner])
    for i, pair in runs(pairs, ends, shared):
        part = h_TF.index_select(0, pair // active) @ weight_DF[i * width : (i + 1) * width].t()
        y_TKC.view(-1, width).index_copy_(0, pair, part)
    return y_TKC


def down_backward(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `down`: [T, F] and [D, F]."""
    width = weight_DF.shape[0] // sub_dims
    inner, grad_rows = shared * width, grad_TKC.reshape(-1, width)
    active = grad_TKC.shape[1] // width
    grad_h, grad_weight = torch.empty_like(h_TF), _slices(weight_DF, ends, shared, sub_dims, columns=False)
    if shared:
        torch.mm(grad_TKC[:, :inner], weight_DF[:inner], out=grad_h)
        torch.mm(grad_TKC[:, :inner].t(), h_TF, out=grad_weight[:inner])
    else:
        grad_h.zero_()
    for i, pair in runs(pairs, ends, shared):
        token, rows = pair // active, slice(i * width, (i + 1) * width)
        part = grad_rows.index_select(0, pair)
        grad_h.index_add_(0, token, part @ weight_DF[rows])
        torch.mm(part.t(), h_TF.index_select(0, token), out=grad_weight[rows])
    return grad_h, grad_weight


def _slices(weight: Tensor, ends: Tensor, shared: int, sub_dims: int, *, columns: bool) -> Tensor:
    """An uninitialized gradient of `weight`, but zero where no token chose the slice."""
    grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    width, start = weight.shape[1 if columns else 0] // sub_dims, 0
    for place, end in enumerate(ends_on_host(ends)):
        part = slice((shared + place) * width, (shared + place + 1) * width)
        if end == start:
            (grad[:, part] if columns else grad[part]).zero_()
        start = end
    return grad
