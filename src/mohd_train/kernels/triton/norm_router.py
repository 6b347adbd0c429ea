"""RMSNorm fused with the router's logits, of the `triton` backend (eqs. 6-7). Products in float32, whatever x is.

x is read once for the norm and the logits: ``E n = rms(x)^-1 * (E (norm_weight * x))``. The backward pass recomputes n from x and
the saved ``rms(x)^-1``.

Shapes: T tokens, D hidden, N sub-dimensions, NP = N padded for tl.dot. x, normed [T, D]; centroids [N, D]; logits [T, N].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohd_train.kernels.reference import product_dtype
from mohd_train.kernels.triton.launch import INTERPRETED, Size, like, tuned

NORM_SIZES = (Size({"BT": 16, "BD": 64}, 4, 2), Size({"BT": 16, "BD": 128}, 4, 2), Size({"BT": 32, "BD": 128}, 8, 2))


@tuned(NORM_SIZES)
@triton.jit
def norm_router_kernel(
    x, norm_weight, centroids, normed, logits, rstd, T, D, eps,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """normed = x / rms(x) * norm_weight, logits = normed @ centroids^T, rstd = 1 / rms(x)."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.arange(0, NP)
    squares = tl.zeros((BT,), dtype=tl.float32)
    acc = tl.zeros((BT, NP), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        value = tl.load(x + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        value = value.to(tl.float32)
        squares += tl.sum(value * value, axis=1)
        scaled = value * tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        e = tl.load(centroids + n[None, :] * D + d[:, None], mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(scaled, e.to(tl.float32), acc, input_precision="ieee")
    r = tl.rsqrt(squares / D + eps)
    tl.store(rstd + t, r, mask=t < T)
    tl.store(logits + t[:, None] * N + n[None, :], acc * r[:, None], mask=(t < T)[:, None] & (n < N)[None, :])
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at, mask = t[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * r[:, None]
        value *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + at, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _grad_normed(
    grad_normed, grad_l, centroids, t, n, d, T, D, N: tl.constexpr,
):  # fmt: skip
    """[BT, BD] float32: the gradient of the normalized x, with what came through the logits."""
    mask = (t < T)[:, None] & (d < D)[None, :]
    grad = tl.load(grad_normed + t[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    e = tl.load(centroids + n[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    return tl.dot(grad_l, e.to(tl.float32), grad, input_precision="ieee")


@tuned(NORM_SIZES)
@triton.jit
def norm_router_grad_x_kernel(
    grad_normed, grad_logits, x, norm_weight, centroids, rstd, grad_x, T, D,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """grad_x = r (v - u mean(v u)), u = x r, v = norm_weight * gradient of the normalized x."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.arange(0, NP)
    r = tl.load(rstd + t, mask=t < T, other=0.0)
    grad_l = tl.load(grad_logits + t[:, None] * N + n[None, :], mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
    dot = tl.zeros((BT,), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        v = _grad_normed(grad_normed, grad_l, centroids, t, n, d, T, D, N)
        v *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        u = tl.load(x + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        dot += tl.sum(v * u.to(tl.float32), axis=1)
    mean = dot * r / D
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at, mask = t[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
        v = _grad_normed(grad_normed, grad_l, centroids, t, n, d, T, D, N)
        v *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * r[:, None]
        tl.store(grad_x + at, (r[:, None] * (v - u * mean[:, None])).to(grad_x.dtype.element_ty), mask=mask)


@tuned(NORM_SIZES)
@triton.jit
def norm_router_grad_weights_kernel(
    grad_normed, grad_logits, x, norm_weight, centroids, rstd, grad_weight, grad_centroids, T, D, SPAN,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Part p, over tokens p * SPAN and on: grad_weight[p, d] and grad_centroids[p, n, d]."""
    part = tl.program_id(1)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, NP)
    stop = tl.minimum((part + 1) * SPAN, T)
    of_weight, of_centroids = tl.zeros((BD,), dtype=tl.float32), tl.zeros((NP, BD), dtype=tl.float32)
    for t0 in range(part * SPAN, stop, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        inside = t < stop
        u = tl.load(x + t[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        u *= tl.load(rstd + t, mask=inside, other=0.0)[:, None]
        at, mask = grad_logits + t[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :]
        grad_l = tl.load(at, mask=mask, other=0.0)
        of_weight += tl.sum(u * _grad_normed(grad_normed, grad_l, centroids, t, n, d, stop, D, N), axis=0)
        of_centroids = tl.dot(tl.trans(grad_l), u, of_centroids, input_precision="ieee")
    tl.store(grad_weight + part * D + d, of_weight, mask=d < D)
    of_centroids *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    at = grad_centroids + (part * N + n)[:, None] * D + d[None, :]
    tl.store(at, of_centroids, mask=(n < N)[:, None] & (d < D)[None, :])


@torch.library.custom_op("mohd::triton_norm_router", mutates_args=())
def _norm_router(
    x: Tensor, norm_weight: Tensor, centroids: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x, norm_weight, centroids = x.contiguous(), norm_weight.contiguous(), centroids.contiguous()
    (tokens, hidden), sub_dims = x.shape, centroids.shape[0]
    normed, rstd = torch.empty_like(x, dtype=dtype), x.new_empty(tokens, dtype=torch.float32)
    logits = x.new_empty(tokens, sub_dims, dtype=torch.float32)
    norm_router_kernel.launch(
        lambda meta: (triton.cdiv(tokens, meta["BT"]),),
        x, norm_weight, centroids, normed, logits, rstd, tokens, hidden, eps, N=sub_dims, NP=_padded(sub_dims),
    )  # fmt: skip
    return normed, logits, rstd


@torch.library.custom_op("mohd::triton_norm_router_backward", mutates_args=())
def _norm_router_backward(
    grad_normed: Tensor, grad_logits: Tensor, x: Tensor, norm_weight: Tensor, centroids: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, norm_weight, centroids = x.contiguous(), norm_weight.contiguous(), centroids.contiguous()
    (tokens, hidden), sub_dims = x.shape, centroids.shape[0]
    inputs = (grad_normed.contiguous(), grad_logits.contiguous(), x, norm_weight, centroids, rstd)
    grad_x, constants = torch.empty_like(x), {"N": sub_dims, "NP": _padded(sub_dims)}
    norm_router_grad_x_kernel.launch(
        lambda meta: (triton.cdiv(tokens, meta["BT"]),),
        *inputs, grad_x, tokens, hidden, **constants,
    )  # fmt: skip
    parts = 1 if INTERPRETED else min(16, triton.cdiv(tokens, 512))  # sums over parts of the tokens fill a GPU better
    grad_weight = x.new_empty(parts, hidden, dtype=torch.float32)
    grad_centroids = x.new_empty(parts, sub_dims, hidden, dtype=torch.float32)
    norm_router_grad_weights_kernel.launch(
        lambda meta: (triton.cdiv(hidden, meta["BD"]), parts),
        *inputs, grad_weight, grad_centroids, tokens, hidden, triton.cdiv(tokens, parts), **constants,
    )  # fmt: skip
    return grad_x, grad_weight.sum(0).to(norm_weight.dtype), grad_centroids.sum(0).to(centroids.dtype)


def _padded(sub_dims: int) -> int:
    return max(16, triton.next_power_of_2(sub_dims))  # the least that tl.dot takes


@_norm_router.register_fake
def _norm_router_shapes(
    x: Tensor, norm_weight: Tensor, centroids: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    logits = x.new_empty(x.shape[0], centroids.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), logits, x.new_empty(x.shape[0], dtype=torch.float32)


_norm_router_backward.register_fake(lambda grad_normed, grad_logits, *rest: like(*rest[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], output[2])


def _gradient(ctx: Any, grad_normed: Tensor, grad_logits: Tensor, unused: Any) -> tuple[Tensor | None, ...]:
    return *_norm_router_backward(grad_normed, grad_logits, *ctx.saved_tensors), None, None


_norm_router.register_autograd(_gradient, setup_context=_save)


def norm_router(x_TD: Tensor, norm_weight_D: Tensor, centroids_ND: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_router`."""
    normed, logits, rstd = _norm_router(x_TD, norm_weight_D, centroids_ND, eps, product_dtype(x_TD))
    return normed, logits, rstd.detach()
