"""The active inputs of a component, made again in the backward pass from what the residual stream keeps anyway.

Shapes: T tokens, D hidden, N sub-dimensions, K active ones a token, C = D / N.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mohd_train.kernels.fusion import blocks


class Source(NamedTuple):
    """What a normalized input came from: ``n = x * rstd * gain``."""

    x_TD: Tensor
    rstd_T: Tensor  # 1 / rms(x), in float32 or wider
    gain_D: Tensor


def active_inputs(x_TD: Tensor, rstd_T: Tensor, gain_D: Tensor, rows: Tensor, sub_dims: int) -> Tensor:
    """n on the active sub-dimensions, compact [T, K*C] in x's dtype, multiplied and rounded as in the norm.

    `rows` int64 [T*K]: token * N + sub-dimension, in the order wanted.
    """
    width = x_TD.shape[1] // sub_dims
    x_rows, gain = x_TD.reshape(-1, width), gain_D.to(rstd_T.dtype).view(sub_dims, width)
    out = x_TD.new_empty(rows.shape[0], width)
    for start, stop in blocks(rows.shape[0], width):
        chosen = rows[start:stop]
        scale = rstd_T.index_select(0, chosen // sub_dims).unsqueeze(1)
        block = x_rows.index_select(0, chosen).to(rstd_T.dtype) * scale
        out[start:stop] = block.mul_(gain.index_select(0, chosen % sub_dims))
    return out.view(x_TD.shape[0], -1)
