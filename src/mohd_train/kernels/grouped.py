"""The GEMMs of the `gathered_runs` path: shared sub-dimensions in one GEMM over all tokens, specialized ones in a GEMM a run.

Tokens keep their order. The rows of all runs are gathered once, run by run; products come back to their tokens by a read through
`places_TP`, the inverse of `pairs`. Every slice of a weight's gradient is written in place by one op, since autograd would fill a
full-size zero tensor for each slice. `ends` lie in host memory (`host`): nothing here waits for a device.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, P = K - S, C = D / N, O and F widths.
A compact tensor is [T, K*C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

NARROW = 64  # up to this width a CPU is slower on a strided slice of a weight than on a copy of the slice
# Products that wait to be summed over a token's slots, at most: columns are taken in blocks of at least LEAST_COLUMNS
PRODUCTS = 1 << 25
LEAST_COLUMNS = 128


def runs(ends: Tensor, shared: int) -> Iterator[tuple[int, slice]]:
    """(sub-dimension, its rows among the pairs) for every specialized sub-dimension that some token chose."""
    start = 0
    for place, end in enumerate(ends.tolist()):
        if end > start:
            yield shared + place, slice(start, end)
        start = end


def _columns(place: int, width: int) -> slice:
    return slice(place * width, (place + 1) * width)


def _add_products(
    out_TO: Tensor, rows_C: Tensor, piece: Callable[[int], Tensor], places_TP: Tensor, ends: Tensor, shared: int
) -> None:
    """Adds each token's P products to `out_TO`, in place: rows of `rows_C` [T*P, C], in run order, times ``piece(i)`` [C, O]."""
    step = max(LEAST_COLUMNS, PRODUCTS // max(1, rows_C.shape[0]))
    found = list(runs(ends, shared))
    for start in range(0, out_TO.shape[1], step):
        out = out_TO[:, start : start + step]
        parts = rows_C.new_empty(rows_C.shape[0], out.shape[1])
        for i, run in found:
            torch.mm(rows_C[run], piece(i)[:, start : start + step], out=parts[run])
        for slot in range(places_TP.shape[1]):
            out.add_(parts.index_select(0, places_TP[:, slot]))


def _place_slots(compact_TKC: Tensor, parts_C: Tensor, places_TP: Tensor) -> None:
    """Writes the specialized slots of `compact_TKC`, in place, from their rows [T*P, C] in run order."""
    width = parts_C.shape[1]
    slots = compact_TKC[:, compact_TKC.shape[1] - places_TP.shape[1] * width :]
    slots.copy_(parts_C.index_select(0, places_TP.reshape(-1)).view(slots.shape))


def up(
    x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, places_TP: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> Tensor:
    """``W x~`` from the compact active inputs. Returns [T, O]."""
    width = weight_OD.shape[1] // sub_dims
    inner, x_rows = shared * width, x_TKC.reshape(-1, width)
    out_TO = x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])
    if shared:
        torch.mm(x_TKC[:, :inner], weight_OD[:, :inner].t(), out=out_TO)
    else:
        out_TO.zero_()
    rows = x_rows.index_select(0, pairs)
    _add_products(out_TO, rows, lambda i: weight_OD[:, _columns(i, width)].t(), places_TP, ends, shared)
    return out_TO


def up_backward(
    grad_TO: Tensor, x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, places_TP: Tensor, ends: Tensor, sub_dims: int,
    shared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `up`: compact [T, K*C], and [O, D]."""
    width = weight_OD.shape[1] // sub_dims
    inner, x_rows = shared * width, x_TKC.reshape(-1, width)
    active = x_TKC.shape[1] // width
    grad_x = torch.empty(x_TKC.shape, dtype=x_TKC.dtype, device=x_TKC.device)
    grad_parts = grad_x.new_empty(pairs.shape[0], width)
    grad_weight = _slices(weight_OD, ends, shared, sub_dims, columns=True)
    if shared:
        torch.mm(grad_TO, weight_OD[:, :inner], out=grad_x[:, :inner])
        torch.mm(grad_TO.t(), x_TKC[:, :inner], out=grad_weight[:, :inner])
    for i, run in runs(ends, shared):
        part, columns = grad_TO.index_select(0, pairs[run] // active), _columns(i, width)
        piece, x_part = weight_OD[:, columns], x_rows.index_select(0, pairs[run])
        if width <= NARROW and weight_OD.is_cpu:
            torch.mm(part, piece.contiguous(), out=grad_parts[run])
            grad_weight[:, columns] = (x_part.t() @ part).t()
        else:
            torch.mm(part, piece, out=grad_parts[run])
            torch.mm(part.t(), x_part, out=grad_weight[:, columns])
    _place_slots(grad_x, grad_parts, places_TP)
    return grad_x, grad_weight


def down(
    h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, places_TP: Tensor, ends: Tensor, sub_dims: int, shared: int,
    active: int,
) -> Tensor:  # fmt: skip
    """The active slices of ``W h``, compact: [T, K*C]."""
    width = weight_DF.shape[0] // sub_dims
    inner = shared * width
    y_TKC = h_TF.new_empty(h_TF.shape[0], active * width)
    parts = h_TF.new_empty(pairs.shape[0], width)
    if shared:
        torch.mm(h_TF, weight_DF[:inner].t(), out=y_TKC[:, :inner])
    for i, run in runs(ends, shared):
        torch.mm(h_TF.index_select(0, pairs[run] // active), weight_DF[_columns(i, width)].t(), out=parts[run])
    _place_slots(y_TKC, parts, places_TP)
    return y_TKC


def down_backward(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor, pairs: Tensor, places_TP: Tensor, ends: Tensor, sub_dims: int,
    shared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `down`: [T, F] and [D, F]."""
    width = weight_DF.shape[0] // sub_dims
    inner, grad_rows = shared * width, grad_TKC.reshape(-1, width)
    active = grad_TKC.shape[1] // width
    grad_h = torch.empty(h_TF.shape, dtype=h_TF.dtype, device=h_TF.device)
    grad_weight = _slices(weight_DF, ends, shared, sub_dims, columns=False)
    if shared:
        torch.mm(grad_TKC[:, :inner], weight_DF[:inner], out=grad_h)
        torch.mm(grad_TKC[:, :inner].t(), h_TF, out=grad_weight[:inner])
    else:
        grad_h.zero_()
    parts = grad_rows.index_select(0, pairs)
    _add_products(grad_h, parts, lambda i: weight_DF[_columns(i, width)], places_TP, ends, shared)
    for i, run in runs(ends, shared):
        tokens = pairs[run] // active
        torch.mm(parts[run].t(), h_TF.index_select(0, tokens), out=grad_weight[_columns(i, width)])
    return grad_h, grad_weight


def _slices(weight: Tensor, ends: Tensor, shared: int, sub_dims: int, *, columns: bool) -> Tensor:
    """An uninitialized gradient of `weight`, but zero where no token chose the slice."""
    grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    width = weight.shape[1 if columns else 0] // sub_dims
    chosen = {i for i, _ in runs(ends, shared)}
    for i in set(range(shared, sub_dims)) - chosen:
        (grad[:, _columns(i, width)] if columns else grad[_columns(i, width)]).zero_()
    return grad
