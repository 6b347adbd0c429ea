"""The public interface of MoHD's sparse execution: every product of a component, on the backend that the caller names.

`resolve_backend` names the backend, and every call takes that name: ``reference`` is the mathematics, ``grouped`` runs on a CPU
and any GPU, ``triton`` on newer NVIDIA GPUs. A component calls `norm_router` and `make_selection` once, then `up_projection` and
`down_projection` (or `swiglu_ffn`, a complete feed-forward layer) and `fuse_residual`.

Shapes: T tokens (batch and sequence flattened), D hidden, N sub-dimensions, K active per token, S shared, C = D / N, F inner
width (attention width or intermediate size), O an output width. Compact tensors [T, K*C] hold only the active sub-dimensions,
slot by slot. All floating-point inputs are differentiable.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohd_train.errors import UserError
from mohd_train.kernels import fusion, reference
from mohd_train.kernels import norm_router as norm
from mohd_train.kernels.grouped import masked, products
from mohd_train.kernels.norm_router import NormInputs
from mohd_train.kernels.reference import product_dtype
from mohd_train.kernels.selection import Selection, choose_path, select
from mohd_train.kernels.slots import count_selected as count_selected
from mohd_train.kernels.slots import gather_active, scatter_active
from mohd_train.kernels.slots import gather_scores as gather_scores

BACKENDS = ("reference", "grouped", "triton")
TRITON_TILES = (128, 64)  # tokens in a tile: the larger one reads each weight half as often


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, *, width: int | None = None, choices: int | None = None
) -> str:
    """The backend that `name` (auto, reference, grouped, triton) stands for on `device` in `dtype`.

    `auto` is `grouped` everywhere until the triton kernels have been measured on a GPU.

    Args:
        width: C, of a sub-dimension.
        choices: how many sets of K - S out of N - S a router can choose.

    Raises:
        UserError: an unknown name, or a backend that cannot run there; the message names the one to use instead.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"kernels: unknown backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    if name == "triton" and (reason := _triton_refusal(device, dtype, width, choices)):
        raise UserError(f"kernels: triton cannot run: {reason}; use kernels: grouped")
    return "grouped" if name == "auto" else name


@torch.compiler.assume_constant_result  # every layer asks at every call; compiled code holds the answer
def _triton_refusal(device: torch.device, dtype: torch.dtype, width: int | None, choices: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from mohd_train.kernels.triton.launch import refusal

    return refusal(device, dtype, width, choices)


TRITON = "mohd_train.kernels.triton."


def chosen_sizes() -> dict[str, Any]:
    """The block sizes that `triton` has chosen in this process, as plain data for `use_sizes` in another one; empty if none."""
    launch = sys.modules.get(f"{TRITON}launch")
    return launch.chosen() if launch else {}


def use_sizes(stored: dict[str, Any]) -> str | None:
    """Makes `triton` use the block sizes of an earlier process instead of choosing again, so that it rounds as that one did.

    Returns:
        Why some of them can't be used, in one line; None if all can.
    """
    for name in ("ffn", "fusion", "norm_router", "projections"):
        importlib.import_module(TRITON + name)
    return sys.modules[f"{TRITON}launch"].use(stored)


def make_selection(indices_TK: Tensor, *, sub_dims: int, shared: int, backend: str) -> Selection:
    """Prepares a router's choice [T, K] for `backend`; a component does it once for all of its products.

    Rows of `indices_TK` ascend; the first S columns are the shared sub-dimensions 0 .. S-1.
    """
    tokens, active = indices_TK.shape
    path = choose_path(backend, indices_TK.device.type, tokens, sub_dims, active, shared)
    return select(indices_TK, sub_dims, shared, path, triton_tile(tokens, active, sub_dims, shared))


def triton_tile(tokens: int, active: int, sub_dims: int, shared: int) -> int:
    """Tokens in a tile for `triton`: the larger size where padding wastes at most a sixteenth.

    All tokens of a tile made the same choice, so the last tile of each possible choice is half empty on average.
    """
    choices = math.comb(sub_dims - shared, active - shared)
    large, small = TRITON_TILES
    return large if 8 * choices * large <= tokens else small


def norm_router(
    x_TD: Tensor, norm_weight_D: Tensor, centroids_ND: Tensor, eps: float, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and the router's logits in one pass over x (eqs. 6-7). Only x and ``1 / rms(x)`` are saved for the backward pass.

    Returns:
        ``n = x / rms(x) * norm_weight`` [T, D] in the dtype of the products that read it (`product_dtype`), so that it is cast once
        and not for each weight; ``E n`` [T, N] in float32 or wider, under autocast too, from n before it is rounded; ``1 / rms(x)``
        [T], without a gradient, for `NormInputs`.
    """
    if backend == "reference":
        return reference.norm_router(x_TD, norm_weight_D, centroids_ND, eps)
    if backend == "triton":
        from mohd_train.kernels.triton import norm_router as triton_norm

        return triton_norm.norm_router(x_TD, norm_weight_D, centroids_ND, eps)
    return norm.norm_router(x_TD, norm_weight_D, centroids_ND, eps)


def up_projection(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    selection: Selection,
    *,
    input_weights_TK: Tensor | None = None,
    norm_inputs: NormInputs | None = None,
    backend: str,
) -> tuple[Tensor, ...]:
    """``W x~`` for every ``W`` [O_i, D]: x~ is x on the token's active sub-dimensions, 0 elsewhere (eqs. 3-5).

    Args:
        input_weights_TK: multiplies each active sub-dimension of x (`gate_input`).
        norm_inputs: what x was normalized from. `grouped` then recomputes the active inputs in the backward pass where it can,
            instead of saving them.

    Returns:
        [T, O_i] for each weight.
    """
    if backend == "reference":
        return reference.up_projection(x_TD, weights, selection.indices_TK, selection.sub_dims, input_weights_TK)
    if selection.path == "masked":
        return masked.up(x_TD, weights, selection, input_weights_TK)
    x_TKC = _active_inputs(x_TD, selection, input_weights_TK)
    if backend == "triton":
        from mohd_train.kernels.triton import projections

        return projections.up(x_TKC, weights, selection)
    return products.up(x_TKC, weights, selection, norm_inputs if input_weights_TK is None else None)


def down_projection(
    h_TF: Tensor, weight_DF: Tensor, selection: Selection, weights_TK: Tensor, *, backend: str
) -> Tensor:
    """The active slices of ``W h``, slot k times `weights_TK[:, k]` (eq. 8, activation scaling). Compact: [T, K*C]."""
    if backend == "reference":
        return reference.down_projection(h_TF, weight_DF, selection.indices_TK, selection.sub_dims, weights_TK)
    if backend == "triton":
        from mohd_train.kernels.triton import projections

        return projections.down(h_TF, weight_DF, selection, weights_TK)
    run = masked.down if selection.path == "masked" else products.down
    return _scale_slots(run(h_TF, weight_DF, selection), weights_TK)


def swiglu_ffn(
    x_TD: Tensor,
    w_gate_FD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    selection: Selection,
    weights_TK: Tensor,
    *,
    input_weights_TK: Tensor | None = None,
    norm_inputs: NormInputs | None = None,
    backend: str,
) -> Tensor:
    """``down(silu(gate x~) * up x~)``, a complete feed-forward layer. Compact: [T, K*C].

    Arguments as for `up_projection` and `down_projection`.
    """
    if backend == "reference" or selection.path == "masked":
        gate_TF, up_TF = up_projection(
            x_TD, (w_gate_FD, w_up_FD), selection, input_weights_TK=input_weights_TK, backend=backend
        )
        return down_projection(F.silu(gate_TF) * up_TF, w_down_DF, selection, weights_TK, backend=backend)
    x_TKC = _active_inputs(x_TD, selection, input_weights_TK)
    if backend == "triton":
        from mohd_train.kernels.triton import ffn

        return ffn.ffn(x_TKC, w_gate_FD, w_up_FD, w_down_DF, selection, weights_TK)
    norm_inputs = norm_inputs if input_weights_TK is None else None
    return _scale_slots(products.ffn(x_TKC, w_gate_FD, w_up_FD, w_down_DF, selection, norm_inputs), weights_TK)


def expert_ffn(
    x_TD: Tensor,
    w_gate_FD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    selection: Selection,
    weights_TK: Tensor,
    *,
    backend: str,
) -> Tensor:
    """The weighted sum of a token's experts, ``sum_k w_k W_down[:, k] (silu(W_gate[k] x) * W_up[k] x)``: [T, D].

    MoHD's two products the other way round, with a selection of N equal slices of F: `down_projection` gives the active
    experts' hidden values, the slices of ``W x``, and `up_projection` sums over them.
    """
    if backend == "reference":
        sizes = (selection.indices_TK, selection.sub_dims, weights_TK)
        return reference.expert_ffn(x_TD, w_gate_FD, w_up_FD, w_down_DF, *sizes)
    x_TD = x_TD.to(product_dtype(x_TD))  # once, not for each weight
    if backend == "triton":
        from mohd_train.kernels.triton import projections

        ones_TK = torch.ones_like(weights_TK)
        gate, up = (projections.down(x_TD, weight, selection, ones_TK) for weight in (w_gate_FD, w_up_FD))
        return projections.up(_scale_slots(F.silu(gate) * up, weights_TK), (w_down_DF,), selection)[0]
    if selection.path == "masked":
        return masked.expert_ffn(x_TD, w_gate_FD, w_up_FD, w_down_DF, selection, weights_TK)
    gate, up = (products.down(x_TD, weight, selection) for weight in (w_gate_FD, w_up_FD))
    return products.up(_scale_slots(F.silu(gate) * up, weights_TK), (w_down_DF,), selection)[0]


def fuse_residual(
    z_TKC: Tensor, mixing_CNN: Tensor | None, selection: Selection, residual_TD: Tensor, *, backend: str
) -> Tensor:
    """``residual + y'``, y'_{i,j} = sum_k mixing[j, i, idx_k] z_{k,j} (eqs. 9, 17).

    Args:
        z_TKC: compact [T, K*C].
        mixing_CNN: the B_j of eq. 9, [C, N, N]; fastest as a permuted view of contiguous memory [N (from), N (to), C]. None: no
            fusion, each slice of z is added to its own sub-dimension.

    Returns:
        [T, D] in the residual's dtype, computed in the mixing's dtype, under autocast too.
    """
    if backend == "reference":
        return reference.fuse_residual(z_TKC, mixing_CNN, selection.indices_TK, selection.sub_dims, residual_TD)
    if mixing_CNN is None:
        return (residual_TD + scatter_active(z_TKC, selection.rows, selection.slots_TN)).to(residual_TD.dtype)
    if backend == "triton":
        from mohd_train.kernels.triton import fusion as triton_fusion

        return triton_fusion.fuse_residual(z_TKC, mixing_CNN.permute(2, 1, 0), selection, residual_TD)
    run = masked.fuse_residual if selection.path == "masked" else fusion.fuse_residual
    return run(z_TKC, mixing_CNN.permute(2, 1, 0), selection, residual_TD)


def _active_inputs(x_TD: Tensor, selection: Selection, input_weights_TK: Tensor | None) -> Tensor:
    x_TKC = gather_active(x_TD, selection.rows, selection.slots_TN)
    return x_TKC if input_weights_TK is None else _scale_slots(x_TKC, input_weights_TK)


def _scale_slots(compact_TKC: Tensor, weights_TK: Tensor) -> Tensor:
    """Slot k times `weights_TK[:, k]`, multiplied in the wider dtype, in the compact tensor's."""
    slots = compact_TKC.unflatten(1, (weights_TK.shape[1], -1))
    return (slots * weights_TK.unsqueeze(-1)).to(compact_TKC.dtype).flatten(1)
