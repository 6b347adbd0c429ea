"""Figs. 9a and 9b: the average of the ten tasks against parameters."""

from __future__ import annotations

from pathlib import Path

from mohd_train.analysis.plotting import finish, panels, save, style
from mohd_train.evaluate.paper import PaperRow, load_paper
from mohd_train.evaluate.results import asked_otherwise
from mohd_train.evaluate.suite import load_suite
from mohd_train.evaluate.sweep_results import SweepResults, merged_tasks
from mohd_train.evaluate.tables import reasons_of


def draw_scores(found: SweepResults, output: Path) -> list[Path]:
    """Figs. 9a and 9b: the average of the ten tasks against activated and total parameters; the paper's points hollow."""
    suite = load_suite()
    tasks = list(suite.tasks.values())
    by_name: dict[str, dict[str, float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    apart: dict[str, list[str]] = {}  # what sets a model's scores apart from the paper's
    for one in merged_tasks(found):
        value = one.scores.get(suite.tasks[one.settings.task].metric)
        if value is not None and not asked_otherwise(suite, one.settings):
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
