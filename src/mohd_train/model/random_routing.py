"""Random routing, the control of the routing sweep: a choice that depends on nothing learned, and is reproducible.

A draw from a random generator would change on recomputation, between training and decoding, and with the batch. Here it is a
hash of the token's id and position and of the layer's component: integer arithmetic, so every device and kernel agrees; causal
and independent of other sequences; and without a pattern in position or id alone that a model could build on.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 64-bit constants of splitmix64 and its finalizer, as signed integers: int64 products wrap around alike on every device.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer: every bit of the input moves half of the output's."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def token_keys(input_ids_BT: Tensor, position_ids: Tensor) -> Tensor:
    """One key for each token of the batch, from its id and position.

    Args:
        input_ids_BT: int64 [B, T].
        position_ids: int64 [B or 1, T].

    Returns:
        int64 [B*T].
    """
    return _mix(_mix(input_ids_BT + _GOLDEN) + position_ids).flatten()


def random_ranks(keys_T: Tensor, sub_dims: int, component: int) -> Tensor:
    """Uniform ranks of the N sub-dimensions for each token; the highest of the specialized ones are taken.

    Args:
        keys_T: int64 [T], from :func:`token_keys`.
        sub_dims: N.
        component: a number of its own for each routed component of the model: 2 * layer, and one more for the FFN.

    Returns:
        int64 [T, N].
    """
    streams_N = torch.arange(1, sub_dims + 1, device=keys_T.device) + component * sub_dims
    # The zeros keep torch 2.11's compiler from computing the products itself: it refuses integers beyond 64 bits
    streams_TN = streams_N + (keys_T[:, None] & 0)
    return _mix(keys_T[:, None] + streams_TN * _GOLDEN)
