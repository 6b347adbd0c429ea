"""The active inputs of a component, made again in the backward pass from what the residual stream keeps anyway.

Shapes: T tokens, D hidden, N sub-dimensions, K active ones a token, C = D / N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mohd_train.kernels.fusion import blocks
from mohd_train.kernels.layout import as_rows


class Source(NamedTuple):
    """What a normalized input came from: ``n = x * rstd * gain``."""

    x_TD: Tensor
    rstd_T: Tensor  # 1 / rms(x), in float32 or wider
    gain_D: Tensor


def active_inputs(source: Source, rows: Tensor, sub_dims: int, dtype: torch.dtype) -> Tensor:
    """n on the active sub-dimensions, [T, K, C]: multiplied and rounded to x's dtype as in the norm, then cast to `dtype`.

    `rows` int64 [T*K]: token * N + sub-dimension, in the order wanted. In blocks, as the fusion.
    """
    x_rows, gain_NC = _views(source, sub_dims)
    out = x_rows.new_empty(rows.shape[0], x_rows.shape[1])
    for start, stop in blocks(rows.shape[0], out.shape[1], out.device):
        out[start:stop] = _made(x_rows, source.rstd_T, gain_NC, rows[start:stop])
    return out.to(dtype).unflatten(0, (source.x_TD.shape[0], -1))


def active_inputs_traced(source: Source, rows: Tensor, sub_dims: int, dtype: torch.dtype) -> Tensor:
    """The same for a compiler, which makes one loop of it."""
    x_rows, gain_NC = _views(source, sub_dims)
    made = _made(x_rows, source.rstd_T, gain_NC, rows).to(x_rows.dtype)
    return made.to(dtype).unflatten(0, (source.x_TD.shape[0], -1))


def _views(source: Source, sub_dims: int) -> tuple[Tensor, Tensor]:
    gain = source.gain_D.to(source.rstd_T.dtype)
    return as_rows(source.x_TD, sub_dims), gain.view(sub_dims, -1)


def _made(x_rows: Tensor, rstd_T: Tensor, gain_NC: Tensor, rows: Tensor) -> Tensor:
    tokens = rows // gain_NC.shape[0]
    scaled = x_rows.index_select(0, rows).to(rstd_T.dtype) * rstd_T.index_select(0, tokens).unsqueeze(1)
    return scaled * gain_NC.index_select(0, rows - tokens * gain_NC.shape[0])
