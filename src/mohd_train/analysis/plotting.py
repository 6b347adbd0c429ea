"""How the figures look and are saved: PDF and PNG, readable in black and white and with colour blindness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mohd_train.utils.files import atomic_path

# Okabe and Ito's colours; dashes and markers distinguish lines where colour doesn't.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0072B2", "linestyle": "--", "marker": "s"},
    {"color": "#D55E00", "linestyle": "-.", "marker": "^"},
    {"color": "#009E73", "linestyle": ":", "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#E69F00", "linestyle": (0, (1, 3)), "marker": "P"},
    {"color": "#56B4E9", "linestyle": (0, (8, 3)), "marker": "X"},
)
SHADES = "Greys"  # of maps; dark means large, in print too
PAPER: dict[str, Any] = {
    "color": "#000000",
    "marker": "*",
    "markersize": 12,
    "markerfacecolor": "white",
    "linestyle": "none",
}
GAUSSIAN: dict[str, Any] = {"color": "#888888", "linestyle": ":", "linewidth": 2.2}  # noise: the reference line
SUFFIXES = (".pdf", ".png")


def style(number: int, every: int = 1) -> dict[str, Any]:
    """Keyword arguments of line ``number``, of 49 that differ; a mark at every ``every``-th point."""
    turn, place = divmod(number, len(STYLES))
    again = {"marker": STYLES[(place + turn) % len(STYLES)]["marker"], "markerfacecolor": "white"} if turn else {}
    return {**STYLES[place], **again, "linewidth": 1.5, "markersize": 4.5, "markevery": every}


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes with their units, and a light grid."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers: layers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def percent_scale(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def panels(count: int, width: float = 5.0, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels side by side; sizes in inches, of one panel."""
    figure, grid = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    return figure, list(grid[0])


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes ``folder/name.pdf`` and ``.png`` atomically, and closes the figure."""
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    for path in paths:
        with atomic_path(path) as part:
            figure.savefig(part, dpi=150, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths
