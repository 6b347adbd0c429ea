"""Figures about sub-dimensions: routing by domain (Fig. 11), and interventions against routing share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mohd_train.analysis.figures import NAMES
from mohd_train.analysis.plotting import SHADES, finish, panels, save, style
from mohd_train.analysis.routing import COMPONENTS, RouterSelection, router_selection
from mohd_train.checkpoint import exists
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import latest_checkpoint
from mohd_train.sweep.folder import SweepFolder

PAPER_LAYER = 5  # of Fig. 11


def draw_router_selection(selections: list[RouterSelection], title: str, folder: Path) -> list[Path]:
    """Fig. 11: one row per domain, one column per sub-dimension. Panels for the probability over all N sub-dimensions, the
    probability over the specialized ones, and the share of tokens that use it. A PDF and a PNG per component."""
    paths = []
    for selection in selections:
        figure, axes = panels(3, width=0.45 * _sub_dims(selection) + 2.2, height=0.42 * len(selection.tokens) + 1.9)
        where = f"{title}, layer {selection.layer}, {NAMES[selection.component]}"
        shown = (
            (selection.probability, f"{where}:\nrouter probability (all)"),
            (selection.specialized_probability, "\nrouter probability (among specialized)"),
            (selection.selected, "\nshare of tokens that use it"),
        )
        for axis, (values, name) in zip(axes, shown, strict=True):
            _cells(axis, values, name, selection.shared)
        paths += save(figure, folder, f"fig11_router_{selection.component}_layer{selection.layer}")
    return paths


def _sub_dims(selection: RouterSelection) -> int:
    return len(next(iter(selection.selected.values())))


def _cells(axes: Axes, values: Any, name: str, shared: int) -> None:
    """A map with its numbers written in the cells, so that nobody has to distinguish shades."""
    rows = np.array([[np.nan if v is None else v for v in row] for row in values.values()], np.float64)
    top = max(float(np.nanmax(rows)), 1e-9) if np.isfinite(rows).any() else 1.0
    axes.imshow(rows, aspect="auto", cmap=SHADES, vmin=0, vmax=1.4 * top)
    for (row, column), value in np.ndenumerate(rows):
        text = "–" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
        dark = not np.isnan(value) and value > 0.9 * top
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_yticks(range(len(values)), values)
    axes.set_xticks(range(rows.shape[1]))
    axes.tick_params(labelsize=7)
    finish(axes, name, f"sub-dimension (0 .. {shared - 1} shared)" if shared else "sub-dimension", "")
    axes.grid(False)


def draw_knockout(record: dict[str, Any], title: str, folder: Path) -> list[Path]:
    """Change in cross-entropy against routing share, one panel per intervention; and as a map of layers and sub-dimensions."""
    kinds = list(record["correlation"])
    figure, axes = panels(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        rows = [row for row in record["effects"] if row["kind"] == kind]
        for number, component in enumerate(dict.fromkeys(row["component"] for row in rows)):
            for shared in (False, True):
                some = [row for row in rows if row["component"] == component and row["shared"] == shared]
                if not some:
                    continue
                look = style(number)
                axis.errorbar(
                    [row["share"] for row in some],
                    [row["delta_nll"] for row in some],
                    yerr=[row["delta_nll_stderr"] or 0.0 for row in some],
                    label=f"{NAMES[component]}, {'shared' if shared else 'specialized'}",
                    color=look["color"],
                    marker=look["marker"],
                    markerfacecolor="white" if shared else look["color"],
                    linestyle="none",
                    markersize=5,
                    elinewidth=0.6,
                )
        found = record["correlation"][kind]["all"]
        rho = "–" if found["spearman"] is None else f"{found['spearman']:+.2f}"
        axis.axhline(0, color="#888888", linewidth=0.8)
        name = f"{title}\n{kind}: Spearman {rho} over {found['n']} specialized"
        finish(axis, name, "share of tokens that use it", "change in cross-entropy (nats a token)")
        axis.legend(frameon=False, fontsize=8)
    return save(figure, folder, "knockout_against_share") + _knockout_map(record, title, folder)


def _knockout_map(record: dict[str, Any], title: str, folder: Path) -> list[Path]:
    """For removal only, the one intervention that is meaningful for every sub-dimension."""
    rows = [row for row in record["effects"] if row["kind"] == "removed"]
    if not rows:
        return []
    components = list(dict.fromkeys(row["component"] for row in rows))
    layers = sorted({row["layer"] for row in rows})
    widest = max(row["sub_dimension"] for row in rows) + 1
    figure, axes = panels(len(components), width=0.5 * widest + 1.8, height=0.3 * len(layers) + 1.8)
    for axis, component in zip(axes, components, strict=True):
        some = {(row["layer"], row["sub_dimension"]): row for row in rows if row["component"] == component}
        size = max(index for _, index in some) + 1
        change = np.array([[some[layer, index]["delta_nll"] for index in range(size)] for layer in layers])
        axis.imshow(change, aspect="auto", cmap=SHADES, vmin=min(0.0, change.min()), vmax=1.4 * max(change.max(), 1e-9))
        for (row, column), value in np.ndenumerate(change):
            mark = "°" if some[layers[row], column]["shared"] else ""
            dark = value > 0.9 * change.max() > 0
            axis.text(
                column,
                row,
                f"{value:+.2g}{mark}",
                ha="center",
                va="center",
                fontsize=5.5,
                color="white" if dark else "black",
            )
        axis.set_yticks(range(len(layers)), layers)
        axis.set_xticks(range(size))
        finish(axis, f"{title}, {NAMES[component]}:\nnats lost when removed (° shared)", "sub-dimension", "layer")
        axis.grid(False)
    return save(figure, folder, "knockout_map")


def draw_router(sweep: Path, run: str, output: Path, layer: int | None, component: str | None) -> list[Path]:
    """Fig. 11 for a run of a sweep, from its last checkpoint on the validation data of its training.

    Args:
        sweep: the sweep's folder.
        run: the run's name.
        layer: from 0; None: the paper's 5, or the last of a shallower model.
        component: ``attention`` or ``ffn``; None: each that is routed.

    Raises:
        UserError: no such run, no checkpoint yet, or a dense model.
    """
    folder = SweepFolder(sweep)
    if run not in folder.runs:
        raise UserError(f"{sweep} has no run {run!r}; it has {', '.join(folder.runs)}")
    checkpoint = latest_checkpoint(sweep / run)
    if not exists(checkpoint):
        raise UserError(f"{run} has no checkpoint yet; see mohd sweep status {sweep}")
    plan = ModelPlan.from_dict(folder.runs[run]["plan"])
    layer = min(PAPER_LAYER, plan.num_hidden_layers - 1) if layer is None else layer
    chosen = [component] if component else [part for part in COMPONENTS if getattr(plan, part) is not None]
    if not chosen:
        raise UserError(f"{run} is dense: it has no router")
    data = folder.source.place(sweep)
    selections = [router_selection(checkpoint, data, layer=layer, component=part) for part in chosen]
    return draw_router_selection(selections, run, output)
