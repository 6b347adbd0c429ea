"""The mix of a run: which domains, in which proportions, and how often each sample is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mohd_train.config.schema import DataConfig
from mohd_train.data.manifest import Manifest
from mohd_train.data.order import counts
from mohd_train.errors import UserError

MAX_EPOCH = 1 << 22  # samples; an epoch's order is computed at its start, so its length is bounded


@dataclass(frozen=True)
class DomainPlan:
    """One domain in a run. `epochs` = planned / available; above 1, samples are seen again, in another order."""

    name: str
    proportion: float
    samples: int  # planned
    tokens: int  # planned
    available: int  # samples

    @property
    def epochs(self) -> float:
        return self.samples / self.available


@dataclass(frozen=True)
class MixPlan:
    """What a run of `total_samples` will see. `absent`: optional domains that the data doesn't have."""

    plans: tuple[DomainPlan, ...]
    total_samples: int
    seq_len: int
    absent: tuple[str, ...] = ()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the order that `domain` of a batch indexes."""
        return tuple(plan.name for plan in self.plans)

    def render(self) -> str:
        """The mix, what repeats and what is absent, as text for the start of a run."""
        lines = [f"data: {self.total_samples:,} samples, {self.total_samples * self.seq_len:,} tokens planned"]
        lines.append(f"  {'domain':<16}{'share':>8}{'samples':>13}{'tokens':>17}{'of available':>14}{'epochs':>9}")
        for plan in self.plans:
            row = f"  {plan.name:<16}{plan.proportion:>8.2%}{plan.samples:>13,}{plan.tokens:>17,}"
            lines.append(row + f"{plan.available:>14,}{plan.epochs:>9.2f}")
        lines += [
            f"  {p.name}: seen more than once: {p.epochs:.2f} epochs of its data" for p in self.plans if p.epochs > 1
        ]
        if self.absent:
            lines.append(f"  absent from the data, so the other shares are renormalized: {', '.join(self.absent)}")
        return "\n".join(lines)


def mixture(data: DataConfig, manifest: Manifest) -> tuple[list[str], NDArray[np.float64]]:
    """Domains of the run, sorted, and their shares [D], which sum to 1. Without domains in the config: all, by size.

    Raises UserError if a domain is missing from the data and not optional, has no samples, or has a proportion that is
    not positive.
    """
    asked = dict(data.domains) or {name: manifest.samples(name, "train") for name in manifest.domains}
    for name, share in asked.items():
        if not 0 < share < float("inf"):
            if not data.domains:
                raise UserError(_no_samples(data, manifest, name))
            raise UserError(f"data.domains.{name}={share}: a proportion must be positive; leave the domain out instead")
    lacking = [name for name in asked if name not in manifest.domains]
    for name in lacking:
        if name not in data.optional_domains:
            raise UserError(
                f"data.domains has {name!r}, which {data.local} lacks (it has {', '.join(sorted(manifest.domains))}); "
                "prepare it, remove it, or list it in data.optional_domains"
            )
    names = sorted(name for name in asked if name in manifest.domains)
    if not names:
        raise UserError(f"{data.local} has none of the domains in data.domains ({', '.join(sorted(asked))})")
    for name in names:
        if not manifest.samples(name, "train"):
            raise UserError(_no_samples(data, manifest, name))
    shares = np.array([asked[name] for name in names], np.float64)
    return names, shares / shares.sum()


def plan_mix(data: DataConfig, manifest: Manifest, total_samples: int) -> MixPlan:
    """Exactly how many samples of each domain a run of `total_samples` sees."""
    names, shares = mixture(data, manifest)
    planned = counts(shares, total_samples)
    plans = tuple(
        DomainPlan(name, float(share), int(n), int(n) * manifest.seq_len, manifest.samples(name, "train"))
        for name, share, n in zip(names, shares, planned, strict=True)
    )
    absent = tuple(sorted(name for name in data.domains if name not in manifest.domains))
    return MixPlan(plans, total_samples, manifest.seq_len, absent)


def epoch_samples(data: DataConfig, manifest: Manifest, global_batch_size: int) -> int:
    """Length of an epoch: as many samples as the run's domains have, in whole global batches, at most about 4.2 million.

    The rounding leaves nothing out: the next epoch continues where the last one ended.
    """
    names, _ = mixture(data, manifest)
    held = sum(manifest.samples(name, "train") for name in names)
    unit = math.lcm(global_batch_size, data.num_canonical_nodes or 1)  # a remainder would be filled with repeats
    return max(1, min(held, MAX_EPOCH) // unit) * unit


def _no_samples(data: DataConfig, manifest: Manifest, name: str) -> str:
    return f"{data.local}: domain {name!r} has less text than one sample of {manifest.seq_len} tokens; remove it, or add text"
