"""Reading a sweep: means over seeds, what is left out of them, what is set aside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.sweep_results import make_sweep, store

from mohd_train.results import store as results
from mohd_train.results.sweep_results import merged_tasks, read_sweep_results


def test_results_asked_otherwise_are_named_and_not_averaged(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    store(folder, "tiny-355m-x2-s2", "sciq", 0.9, lm_eval="0.4.0")
    found = read_sweep_results(folder.path)
    assert [one.scores["acc"] for one in merged_tasks(found)] == [0.3]
    assert "evaluated with other settings" in found.notes[-1]


def test_broken_results_are_named_and_set_aside(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, only=("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    (folder.path / "eval" / "tiny-355m-x2-s1" / "piqa.json").write_text('{"mohd_train": {')
    found = read_sweep_results(folder.path)
    assert set(found.runs[0].tasks) == {"sciq"}
    assert re.search(r"piqa.json is broken and set aside", found.notes[0])


def test_standard_errors_of_a_mean_are_over_seeds(tmp_path: Path) -> None:
    """Not the mean of the seeds' own; a score that one seed lacks has no mean."""
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2",))
    for seed, value in ((1, 0.3), (2, 0.4)):
        store(folder, f"tiny-355m-x2-s{seed}", "sciq", value)
    path = folder.path / "eval" / "tiny-355m-x2-s1" / "sciq.json"
    content = json.loads(path.read_text())
    content[results.KEY]["scores"] |= {"acc_norm": 0.5, "acc_norm_stderr": 0.01}
    path.write_text(json.dumps(content))
    (merged,) = merged_tasks(read_sweep_results(folder.path))
    assert merged.scores == {
        "acc": pytest.approx(0.35),
        "acc_stderr": pytest.approx(0.05),
        "acc_norm": None,
        "acc_norm_stderr": None,
    }
    assert merged.by_seed == {"tiny-355m-x2-s1": 0.3, "tiny-355m-x2-s2": 0.4}
