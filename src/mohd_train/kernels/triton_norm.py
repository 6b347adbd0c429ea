"""Device code of the `triton` backend's RMSNorm fused with the router's logits, and of its gradients (eqs. 6-7).

x is read for the norm and the logits at once: ``E n = rms(x)^-1 * (E (gain * x))``. Products in float32, whatever x is.
The backward pass has n back from x and the kept ``rms(x)^-1``; no full-width normalized copy waits for it.

Shapes: T tokens, D hidden, N sub-dimensions, NP = N padded for tl.dot. x, normed [T, D]; centroids [N, D]; logits [T, N].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_router_kernel(
    x, gain, centroids, normed, logits, rstd, T, D, eps,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """normed = x / rms(x) * gain, logits = normed @ centroids^T, rstd = 1 / rms(x)."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.arange(0, NP)
    squares = tl.zeros((BT,), dtype=tl.float32)
    acc = tl.zeros((BT, NP), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        value = tl.load(x + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        value = value.to(tl.float32)
        squares += tl.sum(value * value, axis=1)
        scaled = value * tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        e = tl.load(centroids + n[None, :] * D + d[:, None], mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(scaled, e.to(tl.float32), acc, input_precision="ieee")
    r = tl.rsqrt(squares / D + eps)
    tl.store(rstd + t, r, mask=t < T)
    tl.store(logits + t[:, None] * N + n[None, :], acc * r[:, None], mask=(t < T)[:, None] & (n < N)[None, :])
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at, mask = t[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * r[:, None]
        value *= tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
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


@triton.jit
def norm_router_grad_x_kernel(
    grad_normed, grad_logits, x, gain, centroids, rstd, grad_x, T, D,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """grad_x = r (v - u mean(v u)), u = x r, v = gain * gradient of the normalized x."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.arange(0, NP)
    r = tl.load(rstd + t, mask=t < T, other=0.0)
    grad_l = tl.load(grad_logits + t[:, None] * N + n[None, :], mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
    dot = tl.zeros((BT,), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        v = _grad_normed(grad_normed, grad_l, centroids, t, n, d, T, D, N)
        v *= tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        u = tl.load(x + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        dot += tl.sum(v * u.to(tl.float32), axis=1)
    mean = dot * r / D
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        at, mask = t[:, None] * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
        v = _grad_normed(grad_normed, grad_l, centroids, t, n, d, T, D, N)
        v *= tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * r[:, None]
        tl.store(grad_x + at, (r[:, None] * (v - u * mean[:, None])).to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def norm_router_grad_weights_kernel(
    grad_normed, grad_logits, x, gain, centroids, rstd, grad_gain, grad_centroids, T, D, SPAN,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Part p, over tokens p * SPAN and on: grad_gain[p, d] and grad_centroids[p, n, d]."""
    part = tl.program_id(1)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, NP)
    stop = tl.minimum((part + 1) * SPAN, T)
    of_gain, of_centroids = tl.zeros((BD,), dtype=tl.float32), tl.zeros((NP, BD), dtype=tl.float32)
    for t0 in range(part * SPAN, stop, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        inside = t < stop
        u = tl.load(x + t[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        u *= tl.load(rstd + t, mask=inside, other=0.0)[:, None]
        at, mask = grad_logits + t[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :]
        grad_l = tl.load(at, mask=mask, other=0.0)
        of_gain += tl.sum(u * _grad_normed(grad_normed, grad_l, centroids, t, n, d, stop, D, N), axis=0)
        of_centroids = tl.dot(tl.trans(grad_l), u, of_centroids, input_precision="ieee")
    tl.store(grad_gain + part * D + d, of_gain, mask=d < D)
    of_centroids *= tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    at = grad_centroids + (part * N + n)[:, None] * D + d[None, :]
    tl.store(at, of_centroids, mask=(n < N)[:, None] & (d < D)[None, :])
