"""Statistics of activations, streamed: memory does not grow with the number of tokens.

Shapes: B sequences, T tokens of one, D dims. The magnitude of a dim is its **square**: "we define the magnitude of each dimension
as the square of its activation value" (Section 2.1, eq. 1); ``absolute`` takes |x| instead. A dim is **active** for a token if
its magnitude is among the top ``share`` of that token's D magnitudes: exactly ``round(share * D)`` dims, ties to the lower dim.
This depends on the order alone, so it is the same for both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mohd_train.analysis.options import MAGNITUDES

HOLD = 0.9  # a token's concentration is 1 - (fewest dims that hold this share of its magnitude) / D
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 0.8)  # of the dims, at which the cumulative magnitude is listed
_TINY = torch.finfo(torch.float64).tiny
_GAUSSIAN_NUMBERS = (
    1 << 22
)  # drawn for the Gaussian reference: 1024 tokens of 4096 dims give a standard error of 0.03 points


def active_count(share: float, width: int) -> int:
    """How many of ``width`` dims are active, at least one."""
    return max(1, round(share * width))


def ranks(magnitude: Tensor) -> Tensor:
    """Int64 [..., D]: rank of each dim within its row in descending order, from 0; ties to the lower dim."""
    order = magnitude.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def active_dims(magnitude: Tensor, share: float) -> Tensor:
    """Bool [..., D]: the ``round(share * D)`` largest of each row, at least one; ties to the lower dim."""
    return ranks(magnitude) < active_count(share, magnitude.shape[-1])


class MagnitudeStatistics:
    """Magnitude, sorted cumulative magnitude, and sparsity of one point of a model.

    Args:
        width: D.
        top_dims: the "top 1000" of Fig. 3.
        by_position: T of the sequences, to also keep the shares for each token position; 0 to not keep them.
        magnitude: one of :data:`MAGNITUDES`.
        epsilon: magnitudes below it count as sparse (eq. 2).
    """

    def __init__(
        self,
        width: int,
        top_dims: int,
        by_position: int = 0,
        device: torch.device | str = "cpu",
        magnitude: str = "square",
        epsilon: float = 0.01,
    ) -> None:
        assert magnitude in MAGNITUDES, magnitude
        self.width, self.top_dims, self.kind, self.epsilon = width, top_dims, magnitude, epsilon
        self.tokens = 0
        self.silent = 0  # all-zero tokens, which have no shares
        self._magnitude_D = torch.zeros(width, dtype=torch.float64, device=device)
        self._curve_D = torch.zeros_like(self._magnitude_D)
        # hoyer, dims that hold HOLD of it, below epsilon, the same of Gaussian noise, below epsilon times the token's mean
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._position = torch.zeros(3, by_position, dtype=torch.float64, device=device)  # tokens, top, half

    def add(self, x_BTD: Tensor) -> Tensor:
        """Adds the tokens of B sequences; returns the mean magnitude of each, [B, T] in float64."""
        x = x_BTD.double()
        magnitude = x.square() if self.kind == "square" else x.abs()
        self.tokens += magnitude.shape[0] * magnitude.shape[1]
        self._magnitude_D += magnitude.sum(dim=(0, 1))
        ordered = magnitude.float().sort(dim=-1, descending=True).values.double()
        total = ordered.sum(dim=-1)
        heard = total > 0
        self.silent += int((~heard).sum())
        curve = (ordered.cumsum(dim=-1) / total.clamp(min=_TINY)[..., None]).clamp(max=1.0)
        kept, loud = curve[heard], ordered[heard]  # [tokens, D]
        self._curve_D += kept.sum(dim=0)
        ratio = total[heard] / loud.square().sum(dim=-1).sqrt()  # l1 / l2: 1 for one dim .. sqrt(D) for all
        root = self.width**0.5
        self._sums += torch.stack(
            [
                ((root - ratio) / (root - 1) if self.width > 1 else torch.zeros_like(ratio)).sum(),
                ((kept < HOLD - 1e-12).sum() + kept.shape[0]).double(),
                (magnitude < self.epsilon).double().mean(dim=-1).sum(),
                self._gaussian_below(x.square().mean(dim=-1)).sum(),
                (loud < self.epsilon * loud.mean(dim=-1, keepdim=True)).double().mean(dim=-1).sum(),
            ]
        )
        if self._position.shape[1]:
            here = torch.stack([heard.double(), curve[..., self.top_dims - 1], curve[..., self._half]])
            self._position += (here * heard).sum(dim=1)
        return total / self.width

    def _gaussian_below(self, mean_square_BT: Tensor) -> Tensor:
        """Share of dims of Gaussian noise with that mean square whose magnitude is below epsilon: erf(limit / (sigma sqrt 2))."""
        limit = self.epsilon**0.5 if self.kind == "square" else self.epsilon
        return torch.erf(limit / (2 * mean_square_BT.clamp(min=_TINY)).sqrt())

    @property
    def _half(self) -> int:
        return active_count(0.5, self.width) - 1

    @property
    def magnitude(self) -> float:
        """Mean over tokens and dims of the magnitude."""
        return float(self._magnitude_D.sum()) / (max(1, self.tokens) * self.width)

    def curve(self) -> Tensor:
        """Float64 [D]: mean share of a token's magnitude that its top 1, 2, .. D dims hold."""
        return (self._curve_D / max(1, self.tokens - self.silent)).cpu()

    def summary(self) -> dict[str, Any]:
        """All statistics as plain numbers."""
        curve, heard = self.curve(), self.tokens - self.silent
        fixed = self._magnitude_D.sort(descending=True).values.cumsum(0)
        fixed = (fixed / fixed[-1].clamp(min=_TINY)).cpu()
        hoyer, needed, below, gaussian, relative = self._sums.tolist()
        return {
            "tokens": self.tokens,
            "silent_tokens": self.silent,
            "magnitude": self.magnitude,
            "share_of_top_dims": float(curve[self.top_dims - 1]),
            "share_of_half": float(curve[self._half]),
            "share_of_top_dims_same_for_all_tokens": float(fixed[self.top_dims - 1]),
            "share_by_dims": {f"{share:g}": float(curve[active_count(share, self.width) - 1]) for share in SHARES},
            "sparsity": below / self.tokens if self.tokens else None,
            "sparsity_gaussian": gaussian / self.tokens if self.tokens else None,
            "sparsity_relative": relative / heard if heard else None,
            "concentration": 1 - needed / (heard * self.width) if heard else None,
            "hoyer": hoyer / heard if heard else None,
        }

    def positions(self) -> dict[str, list[float | None]]:
        """For each token position: the mean share held by the top dims, and by half of the dims."""
        count, top, half = self._position.tolist()
        return {
            name: [value / n if n else None for value, n in zip(values, count, strict=True)]
            for name, values in (("share_of_top_dims", top), ("share_of_half", half))
        }


@cache
def gaussian(width: int, top_dims: int, magnitude: str = "square", epsilon: float = 0.01) -> dict[str, Any]:
    """The :meth:`MagnitudeStatistics.summary` of standard Gaussian noise with ``width`` dims, and its ``curve``.

    The reference for every number: a value equal to it says nothing about the model, since a vector without structure has
    it too. Four million seeded numbers go through the same code as a model's activations.
    """
    statistics = MagnitudeStatistics(width, top_dims, magnitude=magnitude, epsilon=epsilon)
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        tokens = max(1, _GAUSSIAN_NUMBERS // (16 * width))
        statistics.add(torch.randn(1, tokens, width, generator=generator))
    return {**statistics.summary(), "curve": [round(value, 6) for value in statistics.curve().tolist()]}


class CommonActivity:
    """How many dims are active in every one of n consecutive tokens, n = 1 .. ``longest``; and in how many of a few tokens.

    Windows don't cross sequences, but packed sequences hold several documents, so a window may span two documents.

    A dim is among the top k in all tokens of a window if its worst rank in the window is below k, so one histogram of worst
    ranks answers for every threshold.

    Args:
        shares: of the dims that count as active.
        longest: largest number of consecutive tokens (the paper: 9).
        window: tokens in the map of Fig. 5 (the paper: 5).
    """

    def __init__(self, width: int, shares: tuple[float, ...], longest: int = 9, window: int = 5) -> None:
        self.width, self.shares, self.longest, self.window = width, shares, longest, window
        self._worst = torch.zeros(longest, width, dtype=torch.int64)  # [n - 1, rank]: dims whose worst rank it is
        self._windows = [0] * longest
        self._spread = torch.zeros(len(shares), window + 1, dtype=torch.int64)
        self._spread_windows = 0

    def add(self, x_BTD: Tensor) -> None:
        """Adds the tokens of B sequences."""
        batch, length, _ = x_BTD.shape
        rank = ranks(x_BTD.abs())
        worst = rank
        for n in range(1, min(self.longest, length) + 1):
            if n > 1:
                worst = torch.maximum(worst[:, :-1], rank[:, n - 1 :])
            self._worst[n - 1] += torch.bincount(worst.flatten(), minlength=self.width).cpu()
            self._windows[n - 1] += batch * (length - n + 1)
        if length >= self.window:
            for row, share in enumerate(self.shares):
                active = rank < active_count(share, self.width)
                often = active.to(torch.int64).unfold(1, self.window, 1).sum(dim=-1)  # [B, T - window + 1, D]
                self._spread[row] += torch.bincount(often.flatten(), minlength=self.window + 1).cpu()
            self._spread_windows += batch * (length - self.window + 1)

    def common(self, share: float) -> dict[str, float]:
        """n -> mean number of dims active in all of n consecutive tokens, with the top ``share`` of a token's dims active."""
        count = active_count(share, self.width)
        return {
            str(n): int(self._worst[n - 1, :count].sum()) / windows
            for n, windows in enumerate(self._windows, start=1)
            if windows
        }

    def independent(self, share: float) -> dict[str, float]:
        """The same for independent tokens, such as Gaussian noise: ``D * share**n``."""
        active = active_count(share, self.width)
        return {n: self.width * (active / self.width) ** int(n) for n in self.common(share)}

    def summary(self) -> list[dict[str, Any]]:
        """For each share: :meth:`common`, :meth:`independent`, and mean dims active in exactly 0 .. window of ``window`` tokens."""
        return [
            {
                "share": share,
                "active_per_token": active_count(share, self.width),
                "common": self.common(share),
                "independent": self.independent(share),
                "active_in": (self._spread[row] / self._spread_windows).tolist() if self._spread_windows else None,
            }
            for row, share in enumerate(self.shares)
        ]
