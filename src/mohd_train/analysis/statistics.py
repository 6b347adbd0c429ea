"""Statistics of activations, streamed: memory does not grow with the number of tokens.

Shapes: B sequences, T tokens of one, D dims. "Magnitude" of a dim is |x|. A dim is **active** for a token when its magnitude is
among the top ``share`` of that token's D magnitudes (our reading of eqs. 1-2; see docs/observation.md): exactly
``round(share * D)`` dims, ties to the lower dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HOLD = 0.9  # a token's sparsity is 1 - (fewest dims that hold this share of its magnitude) / D
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 0.8)  # of the dims, at which the cumulative magnitude is listed


def active_dims(magnitude: Tensor, share: float) -> Tensor:
    """Bool [..., D]: the ``round(share * D)`` largest of each row, at least one; ties to the lower dim."""
    count = max(1, round(share * magnitude.shape[-1]))
    order = magnitude.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, order, True)


class MagnitudeStatistics:
    """Magnitude, sorted cumulative magnitude, and sparsity of one point of a model.

    Args:
        width: D.
        top_dims: the "top 1000" of Fig. 3.
        by_position: T of the sequences, to keep the shares for each token position too; 0: not.
    """

    def __init__(self, width: int, top_dims: int, by_position: int = 0, device: torch.device | str = "cpu") -> None:
        self.width, self.top_dims = width, top_dims
        self.tokens = 0
        self.silent = 0  # tokens with no magnitude at all: they have no shares
        self._magnitude_D = torch.zeros(width, dtype=torch.float64, device=device)
        self._curve_D = torch.zeros_like(self._magnitude_D)
        self._hoyer = torch.zeros((), dtype=torch.float64, device=device)
        self._needed = torch.zeros_like(self._hoyer)
        self._position = torch.zeros(3, by_position, dtype=torch.float64, device=device)  # tokens, top, half

    def add(self, x_BTD: Tensor) -> None:
        """Takes in the tokens of B sequences."""
        magnitude = x_BTD.abs().float()
        self.tokens += magnitude.shape[0] * magnitude.shape[1]
        self._magnitude_D += magnitude.double().sum(dim=(0, 1))
        ordered = magnitude.sort(dim=-1, descending=True).values.double()
        total = ordered.sum(dim=-1)
        heard = total > 0
        self.silent += int((~heard).sum())
        curve = (ordered.cumsum(dim=-1) / total.clamp(min=torch.finfo(torch.float64).tiny)[..., None]).clamp(max=1.0)
        kept = curve[heard]  # [tokens, D]
        self._curve_D += kept.sum(dim=0)
        self._needed += (kept < HOLD - 1e-12).sum() + kept.shape[0]
        ratio = total[heard] / ordered[heard].square().sum(dim=-1).sqrt()  # l1 / l2: 1 for one dim .. sqrt(D) for all
        root = self.width**0.5
        self._hoyer += ((root - ratio) / (root - 1) if self.width > 1 else torch.zeros_like(ratio)).sum()
        if self._position.shape[1]:
            here = torch.stack([heard.double(), curve[..., self.top_dims - 1], curve[..., self._half]])
            self._position += (here * heard).sum(dim=1)

    @property
    def _half(self) -> int:
        return max(1, round(0.5 * self.width)) - 1

    @property
    def magnitude(self) -> float:
        """Mean over tokens and dims of |x|."""
        return float(self._magnitude_D.sum()) / (max(1, self.tokens) * self.width)

    def curve(self) -> Tensor:
        """Float64 [D]: mean share of a token's magnitude that its top 1, 2, .. D dims hold."""
        return (self._curve_D / max(1, self.tokens - self.silent)).cpu()

    def summary(self) -> dict[str, Any]:
        """What :class:`MagnitudeStatistics` found, as plain numbers."""
        curve, heard = self.curve(), self.tokens - self.silent
        fixed = self._magnitude_D.sort(descending=True).values.cumsum(0)
        fixed = (fixed / fixed[-1].clamp(min=torch.finfo(torch.float64).tiny)).cpu()
        listed = {f"{share:g}": float(curve[max(1, round(share * self.width)) - 1]) for share in SHARES}
        return {
            "tokens": self.tokens,
            "silent_tokens": self.silent,
            "magnitude": self.magnitude,
            "share_of_top_dims": float(curve[self.top_dims - 1]),
            "share_of_half": float(curve[self._half]),
            "share_of_top_dims_same_for_all_tokens": float(fixed[self.top_dims - 1]),
            "share_by_dims": listed,
            "sparsity": 1 - float(self._needed) / (max(1, heard) * self.width) if heard else None,
            "hoyer": float(self._hoyer) / heard if heard else None,
        }

    def positions(self) -> dict[str, list[float | None]]:
        """For each token position: mean share held by the top dims, and by half of the dims."""
        count, top, half = self._position.tolist()
        return {
            name: [value / n if n else None for value, n in zip(values, count, strict=True)]
            for name, values in (("share_of_top_dims", top), ("share_of_half", half))
        }


class CommonActivity:
    """How many dims are active in every one of n consecutive tokens, n = 1 .. ``longest``; and in how many of a few tokens.

    Windows lie within a sequence. Packed sequences hold several documents, so a window may span two.

    Args:
        shares: of the dims, that count as active.
        longest: most consecutive tokens (the paper: 9).
        window: tokens of the map of Fig. 5 (the paper: 5).
    """

    def __init__(self, width: int, shares: tuple[float, ...], longest: int = 9, window: int = 5) -> None:
        self.width, self.shares, self.longest, self.window = width, shares, longest, window
        self._common = torch.zeros(len(shares), longest, dtype=torch.float64)
        self._windows = torch.zeros(longest, dtype=torch.float64)
        self._spread = torch.zeros(len(shares), window + 1, dtype=torch.float64)
        self._spread_windows = 0

    def add(self, x_BTD: Tensor) -> None:
        """Takes in the tokens of B sequences."""
        batch, length, _ = x_BTD.shape
        magnitude = x_BTD.abs()
        for row, share in enumerate(self.shares):
            active = active_dims(magnitude, share)
            together = active
            for n in range(1, min(self.longest, length) + 1):
                if n > 1:
                    together = together[:, :-1] & active[:, n - 1 :]
                self._common[row, n - 1] += together.sum().item()
                self._windows[n - 1] += batch * (length - n + 1) if row == 0 else 0
            if length >= self.window:
                often = active.to(torch.int64).unfold(1, self.window, 1).sum(dim=-1)  # [B, T - window + 1, D]
                self._spread[row] += torch.bincount(often.flatten(), minlength=self.window + 1).double().cpu()
        if length >= self.window:
            self._spread_windows += batch * (length - self.window + 1)

    def summary(self) -> list[dict[str, Any]]:
        """For each share: mean dims active in all of n tokens (``common[n]``), what independent tokens would give
        (``independent[n]``), and mean dims active in exactly 0 .. window of ``window`` tokens."""
        rows = []
        for row, share in enumerate(self.shares):
            active = max(1, round(share * self.width))
            seen = [n for n in range(1, self.longest + 1) if self._windows[n - 1] > 0]
            rows.append(
                {
                    "share": share,
                    "active_per_token": active,
                    "common": {str(n): float(self._common[row, n - 1] / self._windows[n - 1]) for n in seen},
                    "independent": {str(n): self.width * (active / self.width) ** n for n in seen},
                    "active_in": (
                        (self._spread[row] / self._spread_windows).tolist() if self._spread_windows else None
                    ),
                }
            )
        return rows
