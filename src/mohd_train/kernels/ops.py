"""The one public door to MoHD's sparse execution. A backend is resolved once at start and passed to every call.

Shapes: T tokens (batch and sequence flattened), D hidden, N sub-dimensions, K active ones a token, S shared ones,
C = D / N, F inner width (attention width or intermediate size), O an output width. Every floating input takes gradients.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.errors import UserError
from mohd_train.kernels import fusion, grouped_gemm, layout, reference
from mohd_train.kernels import norm_router as norm
from mohd_train.kernels.selection import Selection, choose_path, select
from mohd_train.kernels.slots import count_selected as count_selected
from mohd_train.kernels.slots import take_slots as take_slots
from mohd_train.kernels.source import Source

BACKENDS = ("reference", "grouped", "triton")
TRITON_TILES = (128, 64)  # tokens of a tile: the larger one reads each weight half as often


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, *, width: int | None = None) -> str:
    """The backend that `name` (auto, reference, grouped, triton) means on `device` in `dtype` at sub-dimension width C.

    `auto` is `grouped` everywhere until the triton kernels have been measured on a GPU.

    Raises:
        UserError: an unknown name, or a backend that cannot run there; the message names the one to use instead.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"kernels: unknown backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    if name == "triton" and (reason := _triton_refusal(device, dtype, width)):
        raise UserError(f"kernels: triton cannot run: {reason}; use kernels: grouped")
    return "grouped" if name == "auto" else name


@torch.compiler.assume_constant_result  # a layer asks on every call; traced code keeps the answer
def _triton_refusal(device: torch.device, dtype: torch.dtype, width: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from mohd_train.kernels import triton_ops  # imports triton, which is not there on every platform

    return triton_ops.refusal(device, dtype, width)


def make_selection(indices_TK: Tensor, *, sub_dims: int, shared: int, backend: str) -> Selection:
    """Wraps a router's choice [T, K] for `backend`: once per component, used by all of its ops."""
    tokens, active = indices_TK.shape
    path = choose_path(backend, tokens, sub_dims, active, shared)
    return select(indices_TK, sub_dims, shared, path, triton_tile(tokens, active, sub_dims, shared))


def triton_tile(tokens: int, active: int, sub_dims: int, shared: int) -> int:
    """Tokens of a tile for `triton`. Each choice ends in a tile that is half empty on average: the larger tile is taken where
    that wastes at most a sixteenth."""
    choices = math.comb(sub_dims - shared, active - shared)
    large, small = TRITON_TILES
    return large if 8 * choices * large <= tokens else small


def norm_router(
    x_TD: Tensor, gain_D: Tensor, centroids_ND: Tensor, eps: float, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and the router's logits in one pass over x (eqs. 6-7): ``n = x / rms(x) * gain`` [T, D] in x's dtype, and
    ``E n`` [T, N] in float32 or wider, autocast or not, from n before it is rounded; and ``1 / rms(x)`` [T], a constant to
    autograd, for a `Source`. The backward pass keeps x and ``1 / rms(x)``, not n.
    """
    if backend == "reference":
        return norm.reference(x_TD, gain_D, centroids_ND, eps)
    if backend == "triton":
        from mohd_train.kernels import triton_ops

        return triton_ops.norm_router(x_TD, gain_D, centroids_ND, eps)
    return norm.norm_router(x_TD, gain_D, centroids_ND, eps)


def up_projection(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    selection: Selection,
    *,
    input_weights_TK: Tensor | None = None,
    source: Source | None = None,
    backend: str,
) -> tuple[Tensor, ...]:
    """``W x~`` for every ``W`` [O_i, D]: x~ is x on the token's active sub-dimensions, 0 elsewhere (eqs. 3-5).

    `input_weights_TK` multiplies each active sub-dimension (`gate_input`). Returns one [T, O_i] per weight. With `source`, which
    x must be the norm of, `grouped` makes the active inputs again in the backward pass where it can, rather than keep them.
    """
    if backend == "reference":
        return reference.up_projection(x_TD, weights, selection.indices_TK, selection.sub_dims, input_weights_TK)
    x_TKC = _active_inputs(x_TD, selection, input_weights_TK)
    if backend == "triton":
        from mohd_train.kernels import triton_ops

        return triton_ops.up(x_TKC, weights, selection)
    return grouped_gemm.up(x_TKC, weights, selection, source if input_weights_TK is None else None)


def down_projection(
    h_TF: Tensor, weight_DF: Tensor, selection: Selection, weights_TK: Tensor, *, backend: str
) -> Tensor:
    """The active slices of ``W h``, slot k times `weights_TK[:, k]` (eq. 8, activation scaling). Compact: [T, K*C]."""
    if backend == "reference":
        return reference.down_projection(h_TF, weight_DF, selection.indices_TK, selection.sub_dims, weights_TK)
    if backend == "triton":
        from mohd_train.kernels import triton_ops

        return triton_ops.down(h_TF, weight_DF, selection, weights_TK)
    return _scale(grouped_gemm.down(h_TF, weight_DF, selection), weights_TK)


def swiglu_ffn(
    x_TD: Tensor,
    w_gate_FD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    selection: Selection,
    weights_TK: Tensor,
    *,
    input_weights_TK: Tensor | None = None,
    source: Source | None = None,
    backend: str,
) -> Tensor:
    """``down(silu(gate x~) * up x~)``: both projections of a feed-forward layer in one. Compact: [T, K*C]. `source` as above."""
    if backend == "reference":
        gate_TF, up_TF = up_projection(
            x_TD, (w_gate_FD, w_up_FD), selection, input_weights_TK=input_weights_TK, backend=backend
        )
        return down_projection(F.silu(gate_TF) * up_TF, w_down_DF, selection, weights_TK, backend=backend)
    x_TKC = _active_inputs(x_TD, selection, input_weights_TK)
    if backend == "triton":
        from mohd_train.kernels import triton_ops

        return triton_ops.ffn(x_TKC, w_gate_FD, w_up_FD, w_down_DF, selection, weights_TK)
    source = source if input_weights_TK is None else None
    return _scale(grouped_gemm.ffn(x_TKC, w_gate_FD, w_up_FD, w_down_DF, selection, source), weights_TK)


def fuse_residual(
    z_TKC: Tensor, mixing_CNN: Tensor | None, selection: Selection, residual_TD: Tensor, *, backend: str
) -> Tensor:
    """``residual + y'`` from the compact layout [T, K*C]: y'_{i,j} = sum_k mixing[j, i, idx_k] z_{k,j} (eqs. 9, 17).

    `mixing_CNN` [C, N, N] holds B_j; fastest as a permuted view of contiguous memory [N (from), N (to), C].
    None leaves out the fusion: z is added in its place. Computed in the mixing's dtype, autocast or not.
    Returns [T, D] in the residual's dtype.
    """
    if backend == "reference":
        return reference.fuse_residual(z_TKC, mixing_CNN, selection.indices_TK, selection.sub_dims, residual_TD)
    if mixing_CNN is None:
        return (residual_TD + layout.scatter_active(z_TKC, selection.rows, selection.slots_TN)).to(residual_TD.dtype)
    if backend == "triton":
        from mohd_train.kernels import triton_ops

        return triton_ops.fuse_residual(z_TKC, mixing_CNN.permute(2, 1, 0), selection, residual_TD)
    return fusion.fuse_residual(z_TKC, mixing_CNN.permute(2, 1, 0), selection, residual_TD)


def _active_inputs(x_TD: Tensor, selection: Selection, input_weights_TK: Tensor | None) -> Tensor:
    x_TKC = layout.gather_active(x_TD, selection.rows, selection.slots_TN)
    return x_TKC if input_weights_TK is None else _scale(x_TKC, input_weights_TK)


def _scale(compact_TKC: Tensor, weights_TK: Tensor) -> Tensor:
    """Slot k of a compact tensor times `weights_TK[:, k]`, in the wider dtype, returned in the compact tensor's."""
    slots = compact_TKC.unflatten(1, (weights_TK.shape[1], -1))
    return (slots * weights_TK.unsqueeze(-1)).to(compact_TKC.dtype).flatten(1)
