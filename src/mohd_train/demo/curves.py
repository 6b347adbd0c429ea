"""The loss curves of a few runs in one figure, readable in black and white and by the colour-blind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from mohd_train.errors import UserError
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.run_folder.paths import METRICS
from mohd_train.utils.files import atomic_path

# Okabe and Ito's colours; dashes and markers distinguish the runs where colour does not.
STYLES = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#CC79A7", "-", "v"),
)
TRAIN, VALIDATION = "loss/train/cross_entropy", "metrics/eval/LanguagePerplexity"
SMOOTHING = 0.9  # of the running mean over batches


@dataclass(frozen=True)
class Curve:
    """One run: training loss in nats a token, and validation perplexity, over tokens trained on."""

    name: str
    tokens: list[int]
    loss: list[float]
    validation_tokens: list[int]
    perplexity: list[float]


def read_curve(run: Path) -> Curve:
    """The curve in ``run/metrics.jsonl``. Raises :class:`UserError` where there is none."""
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{run} holds no {METRICS}: not the folder of a run")
    rows = read_metrics(path)
    train = [(row["tokens"], row[TRAIN]) for row in rows if TRAIN in row]
    validation = [(row["tokens"], row[VALIDATION]) for row in rows if VALIDATION in row]
    if not train:
        raise UserError(f"{path} holds no {TRAIN}: the run has not trained a step")
    return Curve(
        run.name,
        [tokens for tokens, _ in train],
        [loss for _, loss in train],
        [tokens for tokens, _ in validation],
        [perplexity for _, perplexity in validation],
    )


def smooth(values: list[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential running mean, corrected for its start (the first value is the first of ``values``)."""
    smoothed, mean, mass = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass)
    return smoothed


def _style(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel(unit)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw(curves: list[Curve], output: Path) -> None:
    """Writes the picture (left: training loss, smoothed; right: validation perplexity); its kind by ``output``'s suffix."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, curve in enumerate(curves):
        colour, dashes, mark = STYLES[number % len(STYLES)]
        style = {"color": colour, "linestyle": dashes, "linewidth": 1.6, "label": curve.name}
        left.plot([t / 1e6 for t in curve.tokens], smooth(curve.loss), **style)
        if curve.perplexity:
            end = f"{curve.name}: {curve.perplexity[-1]:.1f}"
            millions = [t / 1e6 for t in curve.validation_tokens]
            right.plot(millions, curve.perplexity, marker=mark, markersize=4, **(style | {"label": end}))
    _style(left, "Training cross-entropy (running mean)", "nats per token")
    _style(right, "Validation perplexity, all domains", "perplexity (log scale)")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.yaxis.set_minor_formatter(ScalarFormatter())
    left.legend(frameon=False)
    if any(curve.perplexity for curve in curves):
        right.legend(frameon=False, title="at the end")
    with atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
