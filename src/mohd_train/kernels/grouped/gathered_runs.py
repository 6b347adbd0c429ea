"""The products of the `gathered_runs` path: one GEMM over all tokens for the shared sub-dimensions, one per run for the others.

Tokens keep their order. The rows of all runs are gathered at once, run by run, and each token reads its products back through
`positions_TP`, the inverse of `pairs`. One op writes all slices of a weight's gradient in place: autograd would fill a full-size
zero tensor for each slice. `ends` are in host memory, so nothing here waits for the device.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, P = K - S, C = D / N, O and F widths.
Compact tensors are [T, K*C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Up to this width C a CPU multiplies faster by a copy of a strided slice of a weight than by the slice itself
NARROW = 64
# Products held at once before they are summed over a token's slots: a block of columns, of LEAST_COLUMNS or more
PRODUCTS = 1 << 25
LEAST_COLUMNS = 128


def runs(ends: Tensor, shared: int) -> Iterator[tuple[int, slice]]:
    """(sub-dimension, its rows among the pairs) for every specialized sub-dimension that some token chose."""
    start = 0
    for i, end in enumerate(ends.tolist(), shared):
        if end > start:
            yield i, slice(start, end)
        start = end


def part(i: int, width: int) -> slice:
    """The rows or columns of sub-dimension, or slot, `i`."""
    return slice(i * width, (i + 1) * width)


def is_narrow(weight: Tensor, width: int) -> bool:
    """Whether slices of this width are copied before they are multiplied."""
    return weight.is_cpu and width <= NARROW


def _add_products(
    out_TO: Tensor, rows_C: Tensor, weight_slice: Callable[[int], Tensor],
    positions_TP: Tensor, ends: Tensor, shared: int,
) -> None:  # fmt: skip
    """Adds each token's P products to `out_TO` in place: rows [T*P, C] in run order times ``weight_slice(i)`` [C, O]."""
    step = max(LEAST_COLUMNS, PRODUCTS // max(1, rows_C.shape[0]))
    run_list = list(runs(ends, shared))
    for start in range(0, out_TO.shape[1], step):
        out = out_TO[:, start : start + step]
        products = rows_C.new_empty(rows_C.shape[0], out.shape[1])
        for i, run in run_list:
            torch.mm(rows_C[run], weight_slice(i)[:, start : start + step], out=products[run])
        for slot in range(positions_TP.shape[1]):
            out.add_(products.index_select(0, positions_TP[:, slot]))


def _write_slots(compact_TKC: Tensor, rows_C: Tensor, positions_TP: Tensor) -> None:
    """Writes the specialized slots of `compact_TKC` in place, from their rows [T*P, C] in run order."""
    width = rows_C.shape[1]
    slots = compact_TKC[:, compact_TKC.shape[1] - positions_TP.shape[1] * width :]
    slots.copy_(rows_C.index_select(0, positions_TP.reshape(-1)).view(slots.shape))


def up(
    x_TKC: Tensor, weight_OD: Tensor, pairs: Tensor, positions_TP: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> Tensor:
    """``W x~`` [T, O] from the compact active inputs."""
    width = weight_OD.shape[1] // sub_dims
    inner, x_rows = shared * width, x_TKC.reshape(-1, width)
    out_TO = x_TKC.new_empty(x_TKC.shape[0], weight_OD.shape[0])
    if shared:
        torch.mm(x_TKC[:, :inner], weight_OD[:, :inner].t(), out=out_TO)
    else:
        out_TO.zero_()
    rows = x_rows.index_select(0, pairs)
    _add_products(out_TO, rows, lambda i: weight_OD[:, part(i, width)].t(), positions_TP, ends, shared)
    return out_TO


def up_backward(
    grad_TO: Tensor, x_TKC: Tensor, weight_OD: Tensor,
    pairs: Tensor, positions_TP: Tensor, ends: Tensor, sub_dims: int, shared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `up`: of x compact [T, K*C], of the weight [O, D]."""
    width = weight_OD.shape[1] // sub_dims
    inner, x_rows = shared * width, x_TKC.reshape(-1, width)
    active = x_TKC.shape[1] // width
    grad_x = torch.empty(x_TKC.shape, dtype=x_TKC.dtype, device=x_TKC.device)
    grad_rows = grad_x.new_empty(pairs.shape[0], width)
    grad_weight = _empty_gradient(weight_OD, ends, shared, sub_dims, columns=True)
    if shared:
        torch.mm(grad_TO, weight_OD[:, :inner], out=grad_x[:, :inner])
        torch.mm(grad_TO.t(), x_TKC[:, :inner], out=grad_weight[:, :inner])
    for i, run in runs(ends, shared):
        grad, columns = grad_TO.index_select(0, pairs[run] // active), part(i, width)
        weight, x = weight_OD[:, columns], x_rows.index_select(0, pairs[run])
        if is_narrow(weight_OD, width):
            torch.mm(grad, weight.contiguous(), out=grad_rows[run])
            grad_weight[:, columns] = (x.t() @ grad).t()
        else:
            torch.mm(grad, weight, out=grad_rows[run])
            torch.mm(grad.t(), x, out=grad_weight[:, columns])
    _write_slots(grad_x, grad_rows, positions_TP)
    return grad_x, grad_weight


def down(
    h_TF: Tensor, weight_DF: Tensor,
    pairs: Tensor, positions_TP: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int,
) -> Tensor:  # fmt: skip
    """The active slices of ``W h``, compact: [T, K*C]."""
    width = weight_DF.shape[0] // sub_dims
    inner = shared * width
    y_TKC = h_TF.new_empty(h_TF.shape[0], active * width)
    y_rows = h_TF.new_empty(pairs.shape[0], width)
    if shared:
        torch.mm(h_TF, weight_DF[:inner].t(), out=y_TKC[:, :inner])
    for i, run in runs(ends, shared):
        torch.mm(h_TF.index_select(0, pairs[run] // active), weight_DF[part(i, width)].t(), out=y_rows[run])
    _write_slots(y_TKC, y_rows, positions_TP)
    return y_TKC


def down_backward(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor,
    pairs: Tensor, positions_TP: Tensor, ends: Tensor, sub_dims: int, shared: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `down`: of h [T, F], of the weight [D, F]."""
    width = weight_DF.shape[0] // sub_dims
    inner, grad_rows = shared * width, grad_TKC.reshape(-1, width)
    active = grad_TKC.shape[1] // width
    grad_h = torch.empty(h_TF.shape, dtype=h_TF.dtype, device=h_TF.device)
    grad_weight = _empty_gradient(weight_DF, ends, shared, sub_dims, columns=False)
    if shared:
        torch.mm(grad_TKC[:, :inner], weight_DF[:inner], out=grad_h)
        torch.mm(grad_TKC[:, :inner].t(), h_TF, out=grad_weight[:inner])
    else:
        grad_h.zero_()
    grad_runs = grad_rows.index_select(0, pairs)
    _add_products(grad_h, grad_runs, lambda i: weight_DF[part(i, width)], positions_TP, ends, shared)
    for i, run in runs(ends, shared):
        tokens = pairs[run] // active
        torch.mm(grad_runs[run].t(), h_TF.index_select(0, tokens), out=grad_weight[part(i, width)])
    return grad_h, grad_weight


def _empty_gradient(weight: Tensor, ends: Tensor, shared: int, sub_dims: int, *, columns: bool) -> Tensor:
    """A gradient of `weight`: zero in the slices that no token chose, uninitialized elsewhere."""
    grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    width = weight.shape[1 if columns else 0] // sub_dims
    chosen = {i for i, _ in runs(ends, shared)}
    for i in set(range(shared, sub_dims)) - chosen:
        (grad[:, part(i, width)] if columns else grad[part(i, width)]).zero_()
    return grad
