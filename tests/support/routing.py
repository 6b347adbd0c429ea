"""Random selections and operands of one MoHD component, for the kernels' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mohd_train.kernels import ops

NAMES = ("x", "residual", "q", "k", "gate", "up", "down", "o", "mixing", "weights")


def choose(tokens: int, sub_dims: int, top_k: int, shared: int) -> Tensor:
    """Random indices [T, K]: the shared sub-dimensions, then K - S distinct others, ascending."""
    always = torch.arange(shared).expand(tokens, shared)
    chosen = torch.rand(tokens, sub_dims - shared).argsort(1)[:, : top_k - shared].sort(1).values
    return torch.cat([always, chosen + shared], 1)


def operands(indices_TK: Tensor, sub_dims: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every floating input of `component`, with gradients on: D = N * C, head width 10, inner width 14."""
    tokens, top_k = indices_TK.shape
    hidden = sub_dims * width
    shapes = {"x": (tokens, hidden), "residual": (tokens, hidden), "q": (10, hidden), "k": (6, hidden)}
    shapes |= {"gate": (14, hidden), "up": (14, hidden), "down": (hidden, 14), "o": (hidden, 10)}
    made = {name: torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    made["mixing"] = torch.randn(width, sub_dims, sub_dims, dtype=dtype)
    made["weights"] = torch.rand(tokens, top_k, dtype=dtype) + 0.5
    return {name: made[name].requires_grad_() for name in NAMES}


def component(
    backend: str, indices_TK: Tensor, sub_dims: int, shared: int, inputs: dict[str, Tensor], gate_input: bool = False
) -> Tensor:
    """An attention-like and a feed-forward component, one with mixing and one without, through every op: [T, D]."""
    selection = ops.make_selection(indices_TK, sub_dims=sub_dims, shared=shared, backend=backend)
    gate = inputs["weights"] if gate_input else None
    x, weights, mixing = inputs["x"], inputs["weights"], inputs["mixing"]
    q, k = ops.up_projection(x, (inputs["q"], inputs["k"]), selection, input_weights_TK=gate, backend=backend)
    h = torch.tanh(q) * k.sum(1, keepdim=True)
    z = ops.down_projection(h, inputs["o"], selection, weights, backend=backend)
    y = ops.fuse_residual(z, mixing, selection, inputs["residual"], backend=backend)
    ffn = (inputs["gate"], inputs["up"], inputs["down"])
    z = ops.swiglu_ffn(y, *ffn, selection, weights, input_weights_TK=gate, backend=backend)
    return ops.fuse_residual(z, None, selection, y, backend=backend)
