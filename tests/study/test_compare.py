"""Comparisons on runs whose losses are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from study.study_support import make_study, store_measured

from mohd_train.errors import UserError
from mohd_train.study.compare import MEASURED, WITHIN, compare, curve_of
from mohd_train.study.figures import draw_study
from mohd_train.study.record import write_record
from mohd_train.study.recorded import add_recorded, read_recorded
from mohd_train.study.report import show
from mohd_train.study.runs import read_study
from mohd_train.sweep.expand import SweepRun

BARE = {1: 0.05, 2: 0.06, 3: 0.04}  # grows with tokens to this much, by seed
DENSE = {1: 0.01, 2: -0.02, 3: 0.015}


def loss(run: SweepRun, batch: int) -> float:
    """What all runs of a seed share, and a difference to x2 that is known."""
    shared = 3.0 + 400 / batch + 0.3 * run.seed
    part = {"x2-bare": BARE, "dense": DENSE}.get(run.setting.removesuffix("-low"), {})
    return shared + part.get(run.seed, 0.0) * (batch / 800) + (0.1 if run.setting.endswith("-low") else 0.0)


def test_differences_are_paired_and_seeds_cancel(tmp_path: Path) -> None:
    study = read_study(make_study(tmp_path, loss).path)
    parts = compare(study, study.comparisons[0])
    bare, dense = parts.differences
    assert parts.source == WITHIN
    assert (bare.setting, bare.label, bare.seeds) == ("x2-bare", "bare", (1, 2, 3))
    expected = stats.ttest_1samp(list(BARE.values()), 0).confidence_interval(0.95)
    assert bare.at_end is not None
    assert (bare.at_end.mean, bare.at_end.low, bare.at_end.high) == pytest.approx((0.05, expected.low, expected.high))
    assert bare.paper == pytest.approx(math.log(1.1))
    assert (bare.verdict, bare.direction) == ("holds", "grows")
    assert bare.curve is not None
    assert bare.curve.mean == pytest.approx(0.05 * np.arange(1, 9) / 8)
    assert bare.trend is not None
    assert bare.trend.mean == pytest.approx(0.025)
    assert dense.verdict == "can't be told"
    assert dense.direction == "can't be told"


def test_a_sign_against_the_paper_s_and_a_fading_effect(tmp_path: Path) -> None:
    def other(run: SweepRun, batch: int) -> float:
        part = -BARE[run.seed] * (2 - batch / 800) if run.setting == "x2-bare" else 0.0
        return 3.0 + part

    study = read_study(make_study(tmp_path, other).path)
    bare = compare(study, study.comparisons[0]).differences[0]
    assert (bare.verdict, bare.direction) == ("does not hold", "fades")


def test_a_grid_has_the_best_of_each_row(tmp_path: Path) -> None:
    study = read_study(make_study(tmp_path, loss).path)
    grid = compare(study, study.comparisons[1])
    assert grid.best("small-355m", "x2") == "low"  # of seed 1 alone; the others have a higher loss
    assert grid.grid["small-355m", "x2", "low"].mean == pytest.approx(3.0 + 0.5 + 0.3 + 0.1)
    console = Console(width=200, record=True)
    console.print(show(study))
    text = console.export_text()
    assert "3.9000 * (edge)" in text
    assert "+0.050" in text
    assert "holds" in text


def test_what_is_under_way_counts_in_the_curve_alone(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss, finished=lambda run: (run.setting, run.seed) != ("x2-bare", 3))
    bare = compare(*(lambda s: (s, s.comparisons[0]))(read_study(folder.path))).differences[0]
    assert (bare.seeds, bare.under_way) == ((1, 2), (3,))
    assert bare.at_end is not None
    assert bare.at_end.mean == pytest.approx(0.055)
    assert bare.curve is not None
    assert len(bare.curve.tokens) == 4  # to where all three have come
    assert bare.trend is None


def test_a_run_that_was_stopped_does_not_cut_the_others_curve_off(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss, finished=lambda run: (run.setting, run.seed) != ("x2-bare", 3))
    runs = list(read_study(folder.path).of("small-355m", "x2-bare").values())
    curve, without = curve_of(runs), curve_of([run for run in runs if run.finished])
    assert curve is not None
    assert without is not None
    assert len(runs) == 3
    assert len(curve.tokens) == 8
    assert np.array_equal(curve.mean, without.mean)


def test_runs_of_other_batches_are_not_paired(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss)
    run = json.loads((folder.path / "small-355m-x2-bare-s2" / "run.json").read_text())
    (folder.path / "small-355m-x2-bare-s2" / "run.json").write_text(json.dumps(run | {"data": {"sha256": "other"}}))
    study = read_study(folder.path)
    bare = compare(study, study.comparisons[0]).differences[0]
    assert bare.seeds == (1, 3)
    assert study.notes == [
        "small-355m-x2-bare-s2 and small-355m-x2-s2 can't be paired: data: other in small-355m-x2-bare-s2, d in small-355m-x2-s2"
    ]


def documents(run: str, study_seed: int) -> dict[str, tuple[list[int], list[float]]]:
    """80 documents in two domains; x2-bare is worse by 0.02 nats a token in each, dense by a noise that is 0 in the mean."""
    generator = np.random.default_rng(study_seed)
    found = {}
    for name in ("cc", "wiki"):
        tokens = generator.integers(50, 500, 40)
        nll = tokens * generator.normal(3.0, 0.5, 40)
        if "bare" in run:
            nll = nll + 0.02 * tokens
        if "dense" in run:
            noise = np.random.default_rng(9).normal(0, 0.01, 40) * tokens
            nll = nll + noise - noise.sum() / tokens.sum() * tokens
        found[name] = (tokens.tolist(), nll.tolist())
    return found


def test_measured_losses_are_taken_where_every_run_has_them(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss)
    for name in list(folder.runs)[:-1]:
        store_measured(folder, name, documents(name, 5))
    study = read_study(folder.path)
    assert compare(study, study.comparisons[1]).source == WITHIN  # one of its runs isn't measured
    parts = compare(study, study.comparisons[0])
    assert parts.source == MEASURED
    bare, dense = parts.differences
    assert bare.at_end is not None
    assert bare.documents is not None
    assert bare.at_end.mean == pytest.approx(0.02)
    assert (bare.documents.low, bare.documents.mean, bare.documents.high) == pytest.approx((0.02, 0.02, 0.02))
    assert bare.documents.n == 80
    assert dense.documents is not None
    assert dense.documents.low is not None
    assert dense.documents.high is not None
    assert dense.documents.low < 0 < dense.documents.high
    store_measured(folder, "small-355m-x2-s1", documents("x2", 5), limit=3)
    study = read_study(folder.path)
    assert compare(study, study.comparisons[0]).source == WITHIN  # measured in another way


def test_a_broken_measurement_is_named(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss)
    store_measured(folder, "small-355m-x2-s1", documents("x2", 5))
    path = folder.path / "eval" / "small-355m-x2-s1" / "perplexity.json"
    path.write_text(path.read_text()[:40])
    study = read_study(folder.path)
    assert len(study.notes) == 1
    assert "perplexity.json is broken and set aside" in study.notes[0]


def test_the_record_holds_every_run_and_its_page_every_figure(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss, data=str(tmp_path / "gone"))
    for name in folder.runs:
        store_measured(folder, name, documents(name, 5))
    files = write_record(read_study(folder.path), tmp_path / "benchmarks")
    record, page = files[:2]
    assert record.name == "2026-11-26-small-small.json"
    content = json.loads(record.read_text())
    assert len(content["runs"]) == 11
    one = next(run for run in content["runs"] if run["name"] == "small-355m-x2-bare-s2")
    assert (one["config"]["mohd.fusion"], one["config"]["data.shuffle_seed"]) == ("none", 2)
    assert one["config"]["mohd.ffn"] == {"sub_dims": 8, "top_k": 4, "shared_sub_dims": 3}
    assert not one["config"].keys() & content["config"].keys()
    assert content["config"]["model.hidden_size"] == 128
    assert one["curve"]["tokens"] == [409600 * n for n in range(1, 9)]
    assert one["curve"]["loss"][-1] == pytest.approx(3.0 + 0.5 + 0.6 + 0.06)
    parts = content["comparisons"][0]["differences"][0]
    assert parts["at_end"]["mean"] == pytest.approx(0.02)
    text = page.read_text()
    assert "x2-bare" in text
    assert "11 of 11 runs finished" in text
    for figure in files[2:]:
        assert figure.is_file()
        assert f"({figure.parent.name}/{figure.name})" in text
    assert len(files) == 4


def test_nothing_trained_is_said(tmp_path: Path) -> None:
    folder = make_study(tmp_path, loss)
    for name in folder.runs:
        (folder.path / name / "metrics.jsonl").unlink()
    study = read_study(folder.path)
    assert draw_study(study, tmp_path / "figures") == []
    with pytest.raises(UserError, match="no run that has been validated yet"):
        write_record(study, tmp_path / "benchmarks")
    with pytest.raises(UserError, match="is not the folder of a launched sweep"):
        read_study(tmp_path)


def test_runs_of_another_machine_count_through_their_record(tmp_path: Path) -> None:
    """Seeds 1 and 2 from a record, 3 from a folder: the same as all in one folder."""
    whole = make_study(tmp_path / "whole", loss)
    for name in whole.runs:
        store_measured(whole, name, documents(name, 5))
    record = write_record(read_study(whole.path), tmp_path / "benchmarks")[0]
    third = make_study(tmp_path / "third", loss)
    for name in third.runs:
        if name.endswith("s3"):
            store_measured(third, name, documents(name, 5))
        else:
            (third.path / name / "metrics.jsonl").unlink()
    study = read_study(third.path)
    assert compare(study, study.comparisons[0]).differences[0].seeds == (3,)
    add_recorded(study, record)
    want, got = (compare(one, one.comparisons[0]).differences for one in (read_study(whole.path), study))
    for one, other in zip(want, got, strict=True):
        assert (other.seeds, other.verdict, other.direction) == ((1, 2, 3), one.verdict, one.direction)
        assert one.at_end is not None
        assert other.at_end == pytest.approx(one.at_end)
        assert one.curve is not None
        assert other.curve is not None
        assert other.curve.low == pytest.approx(one.curve.low, abs=2e-6)
        assert other.documents is None
    assert study.notes == [f"from {record}: {', '.join(name for name in whole.runs if not name.endswith('s3'))}"]
    again = json.loads(write_record(study, tmp_path / "benchmarks", "again")[0].read_text())["runs"]
    assert sorted(again, key=str) == sorted(json.loads(record.read_text())["runs"], key=str)


def test_a_section_that_only_one_recorded_run_has(tmp_path: Path) -> None:
    """A mixture of experts among models whose ``mohd.experts`` is null."""
    record = write_record(read_study(make_study(tmp_path, loss).path), tmp_path / "benchmarks")[0]
    content = json.loads(record.read_text())
    assert content["config"]["mohd.experts"] is None
    content["runs"][0]["config"]["mohd.experts.num_experts"] = 12
    record.write_text(json.dumps(content))
    first, second = read_recorded(record)[1][:2]
    assert (first.config["mohd"]["experts"], second.config["mohd"]["experts"]) == ({"num_experts": 12}, None)


def test_a_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    study = read_study(make_study(tmp_path, loss).path)
    record = write_record(study, tmp_path / "benchmarks")[0]
    content = json.loads(record.read_text())
    for change, message in (
        ({"scale": "medium"}, "has runs of --scale medium"),
        ({"format": "other/1"}, r"^[^ ]*\.json was not written by mohd study record: its format is 'other/1'"),
        ({"data": ["a", "b"]}, "is not the record of a study on one data set"),
        ({"data": ["e"]}, r"has runs on other data than .* \(sha256 e, not d\)"),
    ):
        record.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            add_recorded(study, record)
    with pytest.raises(UserError, match=r"gone\.json: No such file"):
        add_recorded(study, tmp_path / "gone.json")


def test_a_record_is_not_overwritten_by_one_that_lacks_its_runs(tmp_path: Path) -> None:
    """Two machines, one date, one name."""
    study = read_study(make_study(tmp_path, loss).path)
    record, page = write_record(study, tmp_path / "benchmarks", "name")[:2]
    before = record.read_bytes(), page.read_bytes()
    study.runs = [run for run in study.runs if run.seed == 3]
    with pytest.raises(UserError, match=r"name\.json holds runs that .* lacks \(.*-s1, .*\); give another --name"):
        write_record(study, tmp_path / "benchmarks", "name")
    assert (record.read_bytes(), page.read_bytes()) == before
    add_recorded(study, record)
    write_record(study, tmp_path / "benchmarks", "name")
