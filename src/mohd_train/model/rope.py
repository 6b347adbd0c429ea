"""Rotary position embeddings as LLaMA's, worked out once per step."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(position_ids_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, T, head_dim], worked out in float32 (float64 for a float64 model)."""
    work = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids_BT.device).to(work)
    inverse_frequency = 1.0 / (theta ** (steps / head_dim))
    angles = position_ids_BT[:, None, :, None].to(work) * inverse_frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys [B, heads, T, head_dim]; the result keeps their dtype."""
    cos, sin = table
    first, second = x_BHTE.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BHTE * cos + rotated * sin).to(x_BHTE.dtype)
