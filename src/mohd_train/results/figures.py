"""Figures 8, 9, 10 and 12 from a sweep, plus load, balance loss and throughput; PDF and PNG, readable without color.

The paper's own numbers are hollow marks where it prints any (Figs. 8 and 12 are only pictures there).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from mohd_train.analysis.plotting import PAPER, SHADES, finish, panels, percent_scale, save, style
from mohd_train.results.paper import PaperRow, load_numbers, load_paper
from mohd_train.results.scores import reasons_of
from mohd_train.results.store import settings_mismatch
from mohd_train.results.suite import load_suite
from mohd_train.results.sweep_results import (
    PERPLEXITY,
    Mean,
    RunResult,
    SweepResults,
    merged_tasks,
    read_sweep_results,
)

SHARE = re.compile(r"routing/layer(\d+)/(attention|ffn)/share/(\d+)$")
THROUGHPUT = "throughput/device/tokens_per_sec"
FIG8 = (("495m", "dense"), ("495m", "x3"), ("495m", "75"), ("495m", "50"))


def draw_all(folder: Path, output: Path) -> tuple[list[Path], list[str]]:
    """Draws every figure for which the sweep has runs. Returns the PNG and PDF files, and which figures lack runs.

    Raises:
        UserError: no sweep was launched in ``folder``.
    """
    found = read_sweep_results(folder)
    drawers: dict[str, Callable[[SweepResults, Path], list[Path]]] = {
        "Fig. 8 (perplexity curves)": draw_curves,
        "Fig. 9 (score against parameters)": draw_scores,
        "Fig. 10 (attention and FFN apart)": draw_decoupled,
        "Fig. 12a (share of shared sub-dimensions)": draw_shared,
        "Fig. 12b (number of sub-dimensions)": draw_sub_dims,
        "sub-dimension load": draw_load,
        "balance loss": draw_balance,
        "throughput": draw_throughput,
    }
    paths: list[Path] = []
    missing = []
    for name, draw in drawers.items():
        made = draw(found, output)
        paths += made
        missing += [] if made else [f"{name}: this sweep has no runs for it yet"]
    return paths, missing


def _one_a_setting(found: SweepResults) -> list[RunResult]:
    """The first seed that has trained, for each model and setting."""
    return [trained[0] for runs in found.groups().values() if (trained := [run for run in runs if run.metrics])]


def _label(run: RunResult) -> str:
    name = f"{run.model}-{run.setting}"
    return name if run.status.state == "finished" else f"{name} (batch {run.status.batch})"


def draw_curves(found: SweepResults, output: Path) -> list[Path]:
    """Fig. 8: validation perplexity over tokens, of all models; and of the paper's four if the sweep has them."""
    runs = [run for run in _one_a_setting(found) if run.series(PERPLEXITY)[0]]
    if not runs:
        return []
    chosen = [run for run in runs if (run.base, run.setting) in FIG8]
    sets = {"fig8_perplexity": chosen} if len(chosen) == len(FIG8) else {}
    sets["perplexity_curves"] = runs
    paths = []
    for name, some in sets.items():
        figure, (axis,) = panels(1, width=7.0, height=4.4)
        for i, run in enumerate(some):
            tokens, values = run.series(PERPLEXITY)
            axis.plot(np.array(tokens) / 1e6, values, label=f"{_label(run)}: {values[-1]:.4g}", **style(i))
        percent_scale(axis)
        finish(axis, found.titled("Validation perplexity, all domains"), "tokens (millions)", "perplexity (log scale)")
        axis.legend(frameon=False, fontsize=7, title="at the end", title_fontsize=7)
        paths += save(figure, output, name)
    return paths


def draw_scores(found: SweepResults, output: Path) -> list[Path]:
    """Figs. 9a and 9b: the average of the ten tasks against activated and total parameters."""
    suite = load_suite()
    tasks = list(suite.tasks.values())
    by_name: dict[str, dict[str, float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    apart: dict[str, list[str]] = {}  # why a model's scores can't be compared with the paper's
    for one in merged_tasks(found):
        value = one.scores.get(suite.tasks[one.settings.task].metric)
        if value is not None and not settings_mismatch(suite, one.settings):
            by_name.setdefault(one.model["name"], {})[one.settings.task] = 100 * value
            sizes[one.model["name"]] = (one.model["activated"], one.model["total"])
            reasons = [reason for reason, _ in reasons_of(suite, suite.tasks[one.settings.task], one)]
            apart.setdefault(one.model["name"], []).extend(reasons)
    ours = {name: sum(s.values()) / len(s) for name, s in by_name.items() if len(s) == len(tasks)}
    if not ours:
        return []
    paper = load_paper()
    paths = []
    for letter, which, word in (("a", 0, "activated"), ("b", 1, "total")):
        figure, (axis,) = panels(1, width=6.4, height=4.4)
        for i, base in enumerate(dict.fromkeys(name.partition("-")[0] for name in ours)):
            names = [name for name in ours if name.partition("-")[0] == base]
            look = {**style(i), "linestyle": "none", "label": f"{base}, ours"}
            axis.plot([sizes[name][which] / 1e6 for name in names], [ours[name] for name in names], **look)
            for name in names:
                place = (sizes[name][which] / 1e6, ours[name])
                label = name.partition("-")[2] + (" *" if apart[name] else "")
                axis.annotate(label, place, fontsize=6, xytext=(4, 3), textcoords="offset points")
            theirs = [row for row in paper.values() if row.base.lower() == base]
            x = [_parameters(row)[which] / 1e6 for row in theirs]
            hollow = {**look, "markerfacecolor": "white", "label": f"{base}, paper", "linestyle": "none"}
            axis.plot(x, [row.average for row in theirs], **hollow)
        axis.set_xscale("log")
        marks = dict.fromkeys(reason for name in ours for reason in apart[name])
        note = f"\n* {'; '.join(marks)}" if marks else ""
        finish(
            axis,
            found.titled(f"Average of ten tasks against {word} parameters"),
            f"{word} parameters (millions){note}",
            "accuracy (%)",
        )
        axis.legend(frameon=False, fontsize=7)
        paths += save(figure, output, f"fig9{letter}_score_against_{word}")
    return paths


def _parameters(row: PaperRow) -> tuple[float, float]:
    """(activated, total) as the paper prints them."""

    def read(text: str) -> float:
        return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]

    return read(row.activated), read(row.params)


def _points(found: SweepResults, key: Callable[[RunResult], Any]) -> dict[Any, Mean]:
    """``key(run)`` -> mean perplexity over seeds; runs with the key None are left out."""
    groups: dict[Any, list[RunResult]] = {}
    for run in found.runs:
        value = key(run)
        if value is not None:
            groups.setdefault(value, []).append(run)
    return {value: ppl for value, runs in groups.items() if (ppl := found.perplexity(runs)) is not None}


def _dagger(point: Mean | None) -> str:
    return " †" if point is not None and point.unfinished else ""


def _dagger_note(points: list[Mean]) -> str:
    """A note for the axis label, if a point is of unfinished runs."""
    return "\n† not finished" if any(point.unfinished for point in points) else ""


def _errors(points: list[Mean]) -> list[float]:
    return [point.error or 0.0 for point in points]


def draw_decoupled(found: SweepResults, output: Path) -> list[Path]:
    """Fig. 10: change in perplexity from LLaMA for each pair of active shares, ours and the paper's."""
    rows = load_numbers()["table5_decoupled"]["rows"]

    def key(run: RunResult) -> str | None:
        if run.setting == "dense":
            return "dense"
        match = re.fullmatch(r"attn(\d+)-ffn(\d+)|(25|50|100)", run.setting)
        return f"{match[1] or match[3]}-{match[2] or match[3]}" if match else None

    points = _points(found, key)
    names = [f"{row['attention'].rstrip('%')}-{row['ffn'].rstrip('%')}" for row in rows if "delta" in row]
    if "dense" not in points or not any(
        name.partition("-")[0] != name.partition("-")[2] and name in points for name in names
    ):
        return []
    figure, (axis,) = panels(1, width=7.0)
    shown = [(i, name) for i, name in enumerate(names) if name in points]
    heights = [points[name].value - points["dense"].value for _, name in shown]
    errors = _errors([points[name] for _, name in shown])
    axis.bar(
        [i for i, _ in shown],
        heights,
        yerr=errors,
        color="#999999",
        edgecolor="#000000",
        width=0.6,
        label="ours",
        capsize=2,
    )
    axis.plot(range(len(names)), [row["delta"] for row in rows if "delta" in row], label="paper", **PAPER)
    axis.axhline(0, color="#000000", linewidth=0.8)
    daggers = [_dagger(points.get(name)) or (_dagger(points["dense"]) if name in points else "") for name in names]
    ticks = [f"{name.replace('-', '% - ')}%{dagger}" for name, dagger in zip(names, daggers, strict=True)]
    axis.set_xticks(range(len(names)), ticks, fontsize=7)
    finish(
        axis,
        found.titled("Attention - FFN active: perplexity against LLaMA"),
        f"active share, attention - FFN{_dagger_note([points['dense'], *(points[name] for _, name in shown)])}",
        "change in perplexity",
    )
    axis.legend(frameon=False, fontsize=8)
    return save(figure, output, "fig10_decoupled")


def _line(
    found: SweepResults,
    key: Callable[[RunResult], Any],
    output: Path,
    name: str,
    labels: tuple[str, str],
    best: tuple[str, float],
    log: bool,
) -> list[Path]:
    points = dict(sorted(_points(found, key).items()))
    if len(points) < 3:
        return []
    figure, (axis,) = panels(1)
    x = list(points)
    axis.errorbar(
        x,
        [point.value for point in points.values()],
        yerr=_errors(list(points.values())),
        capsize=2,
        label="ours",
        **style(0),
    )
    axis.axvline(best[1], color="#888888", linestyle=":", linewidth=1.2, label=best[0])
    if log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{value:g}{_dagger(point)}" for value, point in points.items()])
    finish(axis, found.titled(labels[0]), labels[1] + _dagger_note(list(points.values())), "validation perplexity")
    axis.legend(frameon=False, fontsize=8)
    return save(figure, output, name)


def _x2(run: RunResult) -> bool:
    """Whether a run differs from x2 only in N, K and S."""
    return run.setting == "x2" or bool(re.fullmatch(r"x2-(shared|n)\d+", run.setting))


def draw_shared(found: SweepResults, output: Path) -> list[Path]:
    """Fig. 12a: perplexity by the shared fraction of the active sub-dimensions."""

    def key(run: RunResult) -> float | None:
        part = run.plan.ffn
        return part.shared / part.top_k if part and _x2(run) and part.sub_dims == 8 else None

    labels = ("Share of shared sub-dimensions (MoHD x2)", "shared / active")
    return _line(found, key, output, "fig12a_shared_share", labels, ("best in the paper", 0.75), False)


def draw_sub_dims(found: SweepResults, output: Path) -> list[Path]:
    """Fig. 12b: perplexity by the number of sub-dimensions."""

    def key(run: RunResult) -> int | None:
        part = run.plan.ffn
        return part.sub_dims if part and _x2(run) and part.shared * 4 == part.top_k * 3 else None

    labels = ("Number of sub-dimensions (MoHD x2)", "sub-dimensions N")
    return _line(found, key, output, "fig12b_sub_dimensions", labels, ("best in the paper: about 16", 16), True)


def draw_load(found: SweepResults, output: Path) -> list[Path]:
    """The load of each sub-dimension over time: a map for each layer and component, for the first seed of each routed setting."""
    paths = []
    for run in _one_a_setting(found):
        if not any(part.has_choice for part in run.plan.routed.values()):
            continue
        load = _load(run)
        if load:
            paths += _draw_load(found, run, load, output)
    return paths


def _load(run: RunResult) -> dict[tuple[int, str], tuple[list[float], np.ndarray]]:
    """(layer, component) -> (tokens, share [times, N])."""
    rows: dict[tuple[int, str], list[tuple[float, dict[int, float]]]] = {}
    for line in run.metrics:
        parts: dict[tuple[int, str], dict[int, float]] = {}
        for key, value in line.items():
            if match := SHARE.match(key):
                parts.setdefault((int(match[1]), match[2]), {})[int(match[3])] = value
        for place, shares in parts.items():
            rows.setdefault(place, []).append((line["tokens"], shares))
    return {
        place: ([tokens for tokens, _ in some], np.array([[shares[i] for i in sorted(shares)] for _, shares in some]))
        for place, some in sorted(rows.items())
    }


def _draw_load(
    found: SweepResults, run: RunResult, load: dict[tuple[int, str], tuple[list[float], np.ndarray]], output: Path
) -> list[Path]:
    layers = sorted({layer for layer, _ in load})
    shown = layers if len(layers) <= 4 else [layers[round(i * (len(layers) - 1) / 3)] for i in range(4)]
    components = sorted({component for _, component in load})
    size = (2.4 * len(shown) + 0.8, 2.4 * len(components) + 0.4)
    figure, grid = plt.subplots(len(components), len(shown), figsize=size, layout="constrained", squeeze=False)
    places = [(layer, component) for component in components for layer in shown]
    for axis, place in zip(grid.flat, places, strict=True):
        tokens, shares = load[place]
        extent = (tokens[0] / 1e6, tokens[-1] / 1e6, shares.shape[1] - 0.5, -0.5) if len(tokens) > 1 else None
        image = axis.imshow(
            shares.T, aspect="auto", cmap=SHADES, vmin=0, vmax=1, extent=extent, interpolation="nearest"
        )
        finish(axis, f"{place[1]}, layer {place[0]}", "tokens (M)", "sub-dimension" if place[0] == shown[0] else "")
        axis.grid(False)
    figure.colorbar(image, ax=grid, label="share of tokens", fraction=0.02)
    figure.suptitle(found.titled(f"{run.name}: sub-dimension load over time"), fontsize=10)
    return save(figure, output, f"load_{run.name}")


def draw_balance(found: SweepResults, output: Path) -> list[Path]:
    """Balance loss over time, if it isn't 0; a perfectly balanced model has beta times its number of routed components."""
    runs = [run for run in _one_a_setting(found) if any(run.series("loss/train/balance")[1])]
    return _curves(found, runs, "loss/train/balance", "Balance loss", "balance loss", output, "balance_loss")


def draw_throughput(found: SweepResults, output: Path) -> list[Path]:
    """Tokens per second of one device over time."""
    runs = [run for run in _one_a_setting(found) if run.series(THROUGHPUT)[0]]
    return _curves(found, runs, THROUGHPUT, "Throughput of one device", "tokens / s", output, "throughput")


def _curves(
    found: SweepResults, runs: list[RunResult], key: str, title: str, unit: str, output: Path, name: str
) -> list[Path]:
    if not runs:
        return []
    figure, (axis,) = panels(1, width=7.0, height=4.0)
    for i, run in enumerate(runs):
        tokens, values = run.series(key)
        axis.plot(np.array(tokens) / 1e6, values, label=_label(run), **style(i, every=max(1, len(tokens) // 12)))
    finish(axis, found.titled(title), "tokens (millions)", unit)
    axis.set_ylim(0, 1.15 * max(max(run.series(key)[1]) for run in runs))
    axis.legend(frameon=False, fontsize=7)
    return save(figure, output, name)
