"""The GEMMs of `spans` where the sizes of the groups stay on the device: torch's grouped product, in bfloat16 from sm90 on.

For one specialized sub-dimension a token (a group is a run then). Nothing waits for the host. Not measured on a GPU; tested with a
stand-in for the product. Torch 2.7 has none; elsewhere (older torch, sm80, other dtypes, several a token) `spans` reads the
ends once a selection.

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, G = N - S; compact tensors [T, K*C], sorted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[..., Tensor]


@functools.cache
def _product() -> Product | None:
    """``(a, b, offs=ends)``: a [T, X] with b [G, X, Y] gives [T, Y]; a [X, T] with b [T, Y] gives [G, X, Y]."""
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def serves(x: Tensor, chosen: int, width: int) -> bool:
    """Whether the product is there, fast and free of host synchronization for `chosen` slices a token of this width."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and chosen == 1
        and width % 8 == 0  # rows start at multiples of 16 bytes
        and _product() is not None
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def _multiply(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    product = _product()
    assert product is not None
    return product(a, b, offs=ends.to(torch.int32))


def _weight_grads(a_XT: Tensor, b_TY: Tensor, ends: Tensor) -> Tensor:
    """[G, X, Y]; an empty group's product is not relied on."""
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return _multiply(a_XT, b_TY, ends).masked_fill_(empty.view(-1, 1, 1), 0)


def up(x_TKC: Tensor, weight_OD: Tensor, ends: Tensor, sub_dims: int, shared: int) -> Tensor:
    """See `spans.up`."""
    width = weight_OD.shape[1] // sub_dims
    inner = shared * width
    slices = weight_OD.unflatten(1, (sub_dims, width))[:, shared:].permute(1, 2, 0)  # [G, C, O]
    out = _multiply(x_TKC[:, inner:], slices, ends)
    return out.addmm_(x_TKC[:, :inner], weight_OD[:, :inner].t()) if shared else out


def up_backward(
    grad_TO: Tensor, x_TKC: Tensor, weight_OD: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> tuple[Tensor, Tensor]:
    """See `spans.up_backward`."""
    width = weight_OD.shape[1] // sub_dims
    inner, grad_TO = shared * width, grad_TO.contiguous()
    slices = weight_OD.unflatten(1, (sub_dims, width))[:, shared:].permute(1, 0, 2)  # [G, O, C]
    grad_x, grad_weight = x_TKC.new_empty(x_TKC.shape), weight_OD.new_empty(weight_OD.shape)
    torch.mm(grad_TO, weight_OD[:, :inner], out=grad_x[:, :inner])
    torch.mm(grad_TO.t(), x_TKC[:, :inner], out=grad_weight[:, :inner])
    grad_x[:, inner:] = _multiply(grad_TO, slices, ends)
    of_slices = _weight_grads(x_TKC[:, inner:].t(), grad_TO, ends)  # [G, C, O]
    grad_weight.unflatten(1, (sub_dims, width))[:, shared:] = of_slices.permute(2, 0, 1)
    return grad_x, grad_weight


def down(h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int, active: int) -> Tensor:
    """See `spans.down`."""
    width = weight_DF.shape[0] // sub_dims
    inner = shared * width
    slices = weight_DF.unflatten(0, (sub_dims, width))[shared:].transpose(1, 2)  # [G, F, C]
    y_TKC = h_TF.new_empty(h_TF.shape[0], active * width)
    torch.mm(h_TF, weight_DF[:inner].t(), out=y_TKC[:, :inner])
    y_TKC[:, inner:] = _multiply(h_TF, slices, ends)
    return y_TKC


def down_backward(
    grad_TKC: Tensor, h_TF: Tensor, weight_DF: Tensor, ends: Tensor, sub_dims: int, shared: int
) -> tuple[Tensor, Tensor]:
    """See `spans.down_backward`."""
    width = weight_DF.shape[0] // sub_dims
    inner, grad_TKC = shared * width, grad_TKC.contiguous()
    slices = weight_DF.unflatten(0, (sub_dims, width))[shared:]  # [G, C, F]
    grad_weight = weight_DF.new_empty(weight_DF.shape)
    grad_h = _multiply(grad_TKC[:, inner:], slices, ends)
    if shared:
        grad_h.addmm_(grad_TKC[:, :inner], weight_DF[:inner])
    torch.mm(grad_TKC[:, :inner].t(), h_TF, out=grad_weight[:inner])
    grad_weight.unflatten(0, (sub_dims, width))[shared:] = _weight_grads(grad_TKC[:, inner:].t(), h_TF, ends)
    return grad_h, grad_weight
