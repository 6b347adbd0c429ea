"""The products of a few tokens without gradients, as in decoding.

Reading the weights takes most of their time, so each chosen slice is read once, in place. Nothing is sorted: the choices are
copied to the host when the selection is made (`Selection.choices`).

Shapes: T tokens, D hidden, N sub-dimensions, K active, S shared, C = D / N, O and F widths. Compact tensors are [T, K*C].
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TOKENS = 16

Choices = tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]


def choices_of(indices_TK: Tensor, shared: int) -> Choices:
    """(sub-dimension, its tokens, their slots) for each specialized sub-dimension that was chosen. Waits for the device on CUDA."""
    chosen: dict[int, list[tuple[int, int]]] = {}
    for token, row in enumerate(indices_TK[:, shared:].tolist()):
        for slot, i in enumerate(row, shared):
            chosen.setdefault(i, []).append((token, slot))
    return tuple((i, tuple(t for t, _ in pairs), tuple(k for _, k in pairs)) for i, pairs in chosen.items())


def up(x_TKC: Tensor, weight_OD: Tensor, choices: Choices, sub_dims: int, shared: int) -> Tensor:
    """``W x~`` [T, O] from the compact active inputs."""
    width = weight_OD.shape[1] // sub_dims
    # mm, not mv: on a strided slice of a weight, mv takes 1.4 times as long on a CPU
    out = x_TKC[:, : shared * width] @ weight_OD[:, : shared * width].t()
    for i, tokens, slots in choices:
        piece = weight_OD[:, i * width : (i + 1) * width]
        rows = [x_TKC[token, slot * width : (slot + 1) * width] for token, slot in zip(tokens, slots, strict=True)]
        if len(tokens) == 1:
            out[tokens[0] : tokens[0] + 1].addmm_(rows[0].unsqueeze(0), piece.t())
        else:
            for token, part in zip(tokens, torch.stack(rows) @ piece.t(), strict=True):
                out[token] += part
    return out


def down(h_TF: Tensor, weight_DF: Tensor, choices: Choices, sub_dims: int, shared: int, active: int) -> Tensor:
    """The active slices of ``W h``, compact: [T, K*C]."""
    width = weight_DF.shape[0] // sub_dims
    y_TKC = h_TF.new_empty(h_TF.shape[0], active * width)
    torch.mm(h_TF, weight_DF[: shared * width].t(), out=y_TKC[:, : shared * width])
    for i, tokens, slots in choices:
        piece = weight_DF[i * width : (i + 1) * width]
        rows = h_TF if len(tokens) == h_TF.shape[0] else torch.stack([h_TF[token] for token in tokens])
        for token, slot, part in zip(tokens, slots, rows @ piece.t(), strict=True):
            y_TKC[token, slot * width : (slot + 1) * width] = part
    return y_TKC
