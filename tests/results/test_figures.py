"""Figures and the page of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.sweep_results import make_sweep, store

from mohd_train.results import figures
from mohd_train.results.suite import load_suite
from mohd_train.results.sweep_results import read_sweep_results


def test_figures_mark_what_is_not_finished_or_not_comparable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def keep(figure: Any, output: Path, name: str) -> list[Path]:
        axis = figure.axes[0]
        shown.extend([axis.get_xlabel(), *(text.get_text() for text in (*axis.texts, *axis.get_xticklabels()))])
        return [output / name]

    monkeypatch.setattr(figures, "save", keep)
    folder = make_sweep(tmp_path / "s", "fig12a", lambda s, seed: 10.0 if s == "x2" else -11.0)
    assert figures.draw_shared(read_sweep_results(folder.path), tmp_path)
    assert shown[0] == "shared / active\n† not finished"
    assert "0.25 †" in shown
    assert "0.75" in shown
    shown.clear()
    folder = make_sweep(tmp_path / "t", "table4", lambda s, seed: 10.0, only=("x2", "dense"))
    for task in load_suite().tasks:
        store(folder, "tiny-355m-x2-s1", task, 0.3, limit=8)
        store(folder, "tiny-355m-dense-s1", task, 0.3)
    assert figures.draw_scores(read_sweep_results(folder.path), tmp_path)
    assert {"x2 *", "dense"} <= set(shown)
    assert "* run with --limit" in shown[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("table5", {"fig10_decoupled"}),
        ("fig12a", {"fig12a_shared_share"}),
        ("fig12b", {"fig12b_sub_dimensions"}),
    ],
)
def test_figures_of_each_sweep(tmp_path: Path, name: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_load", lambda found, output: [])  # slow, and in the test of the page
    folder = make_sweep(tmp_path / "s", name, lambda s, seed: 10.0 + len(s) / 10)
    paths, missing = figures.draw_all(folder.path, tmp_path / "figures")
    names = {path.stem for path in paths}
    assert expected | {"perplexity_curves", "balance_loss", "throughput"} <= names
    assert all(path.stat().st_size > 1000 for path in paths)
    assert {path.suffix for path in paths} == {".png", ".pdf"}
    assert any(text.startswith("Fig. 9") for text in missing)
