"""Table 2: the paper's row beside ours, differences, marks on what cannot be compared, dashes for what is missing."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from mohd_train.errors import UserError
from mohd_train.results import store as results
from mohd_train.results.paper import load_paper
from mohd_train.results.scores import Scores, build_scores, short_count
from mohd_train.results.suite import Suite, load_suite
from mohd_train.results.table import FORMS

PAPER = load_paper()


def result(suite: Suite, task: str, value: float | None, model: str = "355m-x2", **changes: Any) -> results.Result:
    """A whole, comparable result, with changes to its settings or to itself."""
    spec = suite.tasks[task]
    settings = results.Settings(task, spec.shots, "acc", suite.seed, None, suite.lm_eval, "auto", "float32", "hub")
    known = {key: changes.pop(key) for key in list(changes) if hasattr(settings, key)}
    unfinished = {"unfinished": changes.pop("unfinished")} if "unfinished" in changes else {}
    made = results.Result(
        path=Path(f"{model}/{task}.json"),
        settings=replace(settings, **known),
        model={
            "name": model,
            "fingerprint": "0123456789abcdef",
            "activated": 289406976,
            "total": 709885952,
            "checkpoint": "c",
            **unfinished,
        },
        scores={"acc": value, "acc_stderr": 0.01},
        questions=spec.questions,
        truncated={"requests": 0, "of": 2 * spec.questions, "tokens": 0, "longest": 99},
        subjects=spec.subjects,
        lm_eval_results={},
    )
    return replace(made, **changes)


@pytest.fixture
def whole(suite: Suite) -> list[results.Result]:
    return [result(suite, task, 0.3 + 0.02 * i) for i, task in enumerate(suite.tasks)]


def to_markdown(scores: Scores) -> str:
    return scores.to_table().to_markdown()


def to_csv(scores: Scores) -> str:
    return scores.to_table().to_csv()


def to_latex(scores: Scores) -> str:
    return scores.to_table().to_latex()


def to_html(scores: Scores) -> str:
    return scores.to_table().to_html()


def rows(text: str) -> dict[str, dict[str, str]]:
    return {
        row["row"] + (":" + row["label"] if row["row"] == "ours" else ""): row
        for row in csv.DictReader(io.StringIO(text))
    }


def test_paper_row_and_difference_beside_ours(suite: Suite, whole: list[results.Result]) -> None:
    found = rows(to_csv(build_scores(suite, PAPER, whole)))
    ours, theirs, difference = found["ours:355m-x2"], found["paper"], found["difference"]
    assert theirs["label"] == "MoHD-710M (355M x2), paper"
    assert (ours["activated"], ours["total"]) == (theirs["activated"], theirs["total"]) == ("289M", "710M")
    assert (ours["sciq"], theirs["sciq"], difference["sciq"]) == ("30.0", "76.6", "-46.6")
    assert (ours["lambada_openai"], theirs["lambada_openai"], difference["lambada_openai"]) == ("46.0", "43.3", "+2.7")
    assert (ours["average"], theirs["average"], difference["average"]) == ("39.0", "44.9", "-5.9")
    assert ours["notes"] == ""


def test_missing_is_a_dash_and_never_zero(suite: Suite, whole: list[results.Result]) -> None:
    part = [r for r in whole if r.settings.task != "piqa"]
    for text in (build_scores(suite, PAPER, part).to_table().render(form) for form in FORMS):
        assert "0.0" not in text.replace("30.0", "").replace("40.0", "").replace("50.0", "").replace("60.0", "")
    found = rows(to_csv(build_scores(suite, PAPER, part)))
    assert found["ours:355m-x2"]["piqa"] == found["ours:355m-x2"]["average"] == ""
    assert found["difference"]["piqa"] == found["difference"]["average"] == ""
    assert "| – |" in to_markdown(build_scores(suite, PAPER, part))
    zero = build_scores(suite, PAPER, [result(suite, "sciq", 0.0)])
    assert rows(to_csv(zero))["ours:355m-x2"]["sciq"] == "0.0"  # a true zero stays one


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"limit": 8, "questions": 8}, "run with --limit: boolq 8 of 3270 questions"),
        ({"questions": 120}, "not all of the task's questions: boolq 120 of 3270"),
        ({"seed": 7}, "other shots drawn: seed 7, not 1234"),
        ({"scores": {"acc_norm": 0.5}}, "the result has no acc: boolq"),
        ({"unfinished": "interrupted, batch 30"}, "not trained to its end: 355m-x2 interrupted, batch 30"),
        ({"demo": True, "questions": 8}, "demo questions, not the task's own: the number is not meaningful"),
        (
            {"truncated": {"requests": 12, "of": 6540, "tokens": 9, "longest": 5000}},
            "requests longer than the model's context, their first shots cut: 355m-x2 boolq 12 of 6540",
        ),
        ({"questions": 3271}, "more questions than the task has: boolq 3271, not 3270"),
        ({"bos": "no"}, "asked with --bos no: 355m-x2 boolq"),
        (
            {"joined": {"requests": 7, "alone": 2}},
            "answers that share a token with their question: 355m-x2 boolq 7 of 6540 (2 encoded alone)",
        ),
        ({"scores": {"acc": float("nan")}}, "boolq: the score is not a number (nan): 355m-x2"),
    ],
)
def test_what_cannot_be_compared_is_marked(
    suite: Suite, whole: list[results.Result], changes: dict[str, Any], note: str
) -> None:
    whole = [result(suite, "boolq", 0.5, **changes) if r.settings.task == "boolq" else r for r in whole]
    table = build_scores(suite, PAPER, whole)
    assert note in rows(to_csv(table))["ours:355m-x2"]["notes"]
    markdown = to_markdown(table)
    assert f"<sup>a</sup> {note}" in markdown
    ours = next(line for line in markdown.splitlines() if line.startswith("| **355m-x2**"))
    assert ours.count("<sup>a</sup>") == (1 if "scores" in changes else 2)  # the cell, and the average over it
    difference = next(line for line in markdown.splitlines() if line.startswith("| difference"))
    assert difference.count("<sup>a</sup>") == ours.count("<sup>a</sup>")
    assert note.partition(":")[0] in rows(to_csv(table))["difference"]["notes"]
    assert "{a}" in to_latex(table)


def test_a_question_cut_without_shots_loses_no_shots(suite: Suite, whole: list[results.Result]) -> None:
    cut = {"requests": 3, "of": 2534, "tokens": 9, "longest": 5000}
    whole = [replace(one, truncated=cut) if one.settings.task == "winogrande" else one for one in whole]
    notes = rows(to_csv(build_scores(suite, PAPER, whole)))["ours:355m-x2"]["notes"]
    assert notes == (
        "requests longer than the model's context, the beginning of the question cut: 355m-x2 winogrande 3 of 2534"
    )


def test_a_model_of_another_size_is_marked_whatever_its_name(suite: Suite) -> None:
    """--name 355m-dense on SmolLM2-135M."""
    one = result(suite, "sciq", 0.5, model="355m-dense")
    small = replace(one, model={**one.model, "activated": 106_204_032, "total": 134_515_008})
    table = build_scores(suite, PAPER, [small])
    note = (
        "not the paper's model: other parameter counts (activated / total): "
        "355m-dense 106M / 135M, LLaMA2-355M 289M / 355M"
    )
    found = rows(to_csv(table))
    assert found["ours:355m-dense"]["notes"] == note
    assert found["difference"]["notes"] == note.partition(": 355m")[0]
    markdown = to_markdown(table)
    assert "| **355m-dense** <sup>a</sup> | 106M | 135M |" in markdown
    assert "| difference <sup>a</sup> |" in markdown
    assert f"<sup>a</sup> {note}" in markdown
    assert "355m-dense$^{a}$" in to_latex(table).replace(r"\_", "_")
    assert "355m-dense (a)" in to_html(table)
    same = replace(one, model={**one.model, "activated": 289_406_976, "total": 354_942_976})
    assert rows(to_csv(build_scores(suite, PAPER, [same])))["ours:355m-dense"]["notes"] == ""


def test_results_of_more_than_one_precision_are_marked(suite: Suite, whole: list[results.Result]) -> None:
    whole = [result(suite, "boolq", 0.5, dtype="bfloat16") if r.settings.task == "boolq" else r for r in whole]
    notes = rows(to_csv(build_scores(suite, PAPER, whole)))["ours:355m-x2"]["notes"]
    assert "results of more than one precision: 355m-x2: float32 for sciq" in notes
    assert notes.endswith("bfloat16 for boolq")


def test_scores_stand_with_their_standard_error(suite: Suite, whole: list[results.Result]) -> None:
    """lm-eval's, and that of a mean of ten independent scores."""
    table = build_scores(suite, PAPER, whole)
    ours = rows(to_csv(table))["ours:355m-x2"]
    assert (ours["sciq"], ours["sciq_stderr"]) == ("30.0", "1.0")
    assert table.rows[0].average.error == pytest.approx(math.sqrt(10) * 1.0 / 10)
    assert ours["average_stderr"] == "0.3"
    for form, shown in ((to_markdown, "| 30.0 ± 1.0 |"), (to_latex, r"& 30.0 $\pm$ 1.0 &")):
        assert shown in form(table)
    assert "± is the standard error over questions (lm-eval's)." in to_markdown(table)
    assert "±" not in to_latex(table)
    without = [replace(one, scores={"acc": 0.5}) if one.settings.task == "sciq" else one for one in whole]
    ours = rows(to_csv(build_scores(suite, PAPER, without)))["ours:355m-x2"]
    assert (ours["sciq_stderr"], ours["piqa_stderr"], ours["average_stderr"]) == ("", "1.0", "")


def test_standard_error_over_seeds_of_the_average_of_each(suite: Suite, whole: list[results.Result]) -> None:
    """Tasks of one seed go up and down together: the average's error is not that of independent scores."""
    by_seed = [{"s1": one.scores["acc"] - 0.01, "s2": one.scores["acc"] + 0.01} for one in whole]  # type: ignore[operator]
    merged = [
        replace(one, by_seed=each, scores={**one.scores, "acc_stderr": 0.01})
        for one, each in zip(whole, by_seed, strict=True)
    ]
    table = build_scores(suite, PAPER, merged)
    assert table.rows[0].average.error == pytest.approx(1.0)
    assert "± is the standard error over seeds of 355m-x2 (2)." in to_markdown(table)
    other = [result(suite, task, 0.4, model="355m-dense") for task in suite.tasks]
    text = to_markdown(build_scores(suite, PAPER, [*merged, *other]))
    assert "± is the standard error over seeds of 355m-x2 (2), else over questions (lm-eval's)." in text


def test_every_number_of_the_csv_can_be_parsed(suite: Suite, whole: list[results.Result]) -> None:
    lacking = [one for one in whole if one.settings.task != "piqa"]
    text = to_csv(build_scores(suite, PAPER, lacking))
    frame = pandas.read_csv(io.StringIO(text))
    numeric = [*suite.tasks, "average", "mmlu_macro", *(f"{name}_stderr" for name in (*suite.tasks, "average"))]
    assert {str(frame[name].dtype) for name in numeric} == {"float64"}
    assert frame["piqa"].isna().tolist() == [True, False, True]
    assert frame["sciq"].tolist() == [30.0, 76.6, -46.6]


def test_the_mean_over_subjects_stands_beside_that_over_questions(suite: Suite) -> None:
    scores = {"acc": 0.25, "acc_stderr": 0.004, "acc_macro": 0.262, "acc_macro_stderr": 0.005}
    table = build_scores(suite, PAPER, [result(suite, "mmlu", 0.25, scores=scores)])
    ours = rows(to_csv(table))["ours:355m-x2"]
    assert (ours["mmlu"], ours["mmlu_stderr"], ours["mmlu_macro"]) == ("25.0", "0.4", "26.2")
    for form in (to_markdown, to_html):
        assert "MMLU weighs every question the same; weighing every subject the same: 355m-x2 26.2 ± 0.5." in form(
            table
        )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"shots": 0}, "other shots: left out: boolq 0, not 32, 355m-x2: 50.0"),
        ({"lm_eval": "0.4.2"}, "another harness version than lm-eval 0.4.13: left out: boolq 0.4.2, 355m-x2: 50.0"),
    ],
)
def test_what_was_asked_otherwise_is_named_and_never_in_the_column(
    suite: Suite, whole: list[results.Result], changes: dict[str, Any], note: str
) -> None:
    whole = [result(suite, "boolq", 0.5, **changes) if r.settings.task == "boolq" else r for r in whole]
    table = build_scores(suite, PAPER, whole)
    found = rows(to_csv(table))
    ours, difference = found["ours:355m-x2"], found["difference"]
    assert ours["boolq"] == ours["average"] == difference["boolq"] == difference["average"] == ""
    assert note in ours["notes"]
    assert f"<sup>a</sup> {note}" in to_markdown(table)
    better = [result(suite, "boolq", 0.9, model="355m-x3", **changes), result(suite, "boolq", 0.2, model="355m-x4")]
    best = build_scores(suite, PAPER, [*whole, *better]).best()
    assert not {column for _, column in best if column == list(suite.tasks).index("boolq")}


@pytest.mark.parametrize("changes", [{"limit": 8, "questions": 8}, {"unfinished": "stopped, batch 3"}])
def test_a_score_of_a_part_is_never_the_best(
    suite: Suite, whole: list[results.Result], changes: dict[str, Any]
) -> None:
    column = list(suite.tasks).index("boolq")
    other = [result(suite, "boolq", 0.9, model="355m-x3"), result(suite, "boolq", 0.8, model="355m-x4")]
    assert (3, column) in build_scores(suite, PAPER, [*whole, *other]).best()
    part = [result(suite, "boolq", 0.9, model="355m-x3", **changes), other[1]]
    best = build_scores(suite, PAPER, [*whole, *part]).best()
    assert (3, column) not in best
    assert (6, column) in best


def test_a_task_that_could_not_be_had_is_a_dash_with_the_reason(suite: Suite, whole: list[results.Result]) -> None:
    part = [one for one in whole if one.settings.task != "logiqa"]
    missing = [
        results.Missing("logiqa", part[0].model, "script data set"),
        results.Missing("logiqa", {**part[0].model, "fingerprint": "another"}, "no network"),
        results.Missing("piqa", part[0].model, "had later"),
    ]
    table = build_scores(suite, PAPER, part, missing=missing)
    ours = rows(to_csv(table))["ours:355m-x2"]
    assert (ours["logiqa"], ours["notes"]) == ("", "logiqa was unavailable: script data set")
    assert "| – <sup>a</sup> |" in to_markdown(table)
    assert "<sup>a</sup> logiqa was unavailable: script data set" in to_markdown(table)


def test_mmlu_of_some_subjects_is_marked(suite: Suite) -> None:
    table = build_scores(suite, PAPER, [result(suite, "mmlu", 0.25, subjects=3)])
    assert "not all subjects: mmlu 3 of 57" in rows(to_csv(table))["ours:355m-x2"]["notes"]


def test_order_and_models_that_the_paper_lacks(suite: Suite) -> None:
    models = ["tiny-x2", "1.13b-75", "355m-dense"]
    table = build_scores(suite, PAPER, [result(suite, "sciq", 0.5, model=name) for name in models])
    assert [(row.model, row.kind) for row in table.rows] == [
        *[("355m-dense", kind) for kind in ("ours", "paper", "difference")],
        *[("1.13b-75", kind) for kind in ("ours", "paper", "difference")],
        ("tiny-x2", "ours"),
    ]


def test_models_beside_the_papers_stand_in_its_order_of_settings(suite: Suite) -> None:
    names = ["tiny-x2", "tiny-50", "tiny-mine", "tiny-dense", "small-x4"]
    table = build_scores(suite, {}, [result(suite, "sciq", 50.0, model=name) for name in names])
    assert [row.label for row in table.rows] == ["small-x4", "tiny-dense", "tiny-50", "tiny-x2", "tiny-mine"]


def test_two_checkpoints_of_one_name_keep_their_own_rows(suite: Suite) -> None:
    one = result(suite, "sciq", 0.5, model="tiny-x2")
    other = replace(one, model={**one.model, "fingerprint": "fedcba9876543210"}, path=Path("other.json"))
    table = build_scores(suite, PAPER, [one, other])
    assert [row.label for row in table.rows] == ["tiny-x2 [012345]", "tiny-x2 [fedcba]"]


def test_two_results_for_one_cell_are_refused(suite: Suite) -> None:
    one = result(suite, "sciq", 0.5)
    with pytest.raises(UserError, match=r"two results for sciq of 355m-x2: 355m-x2/sciq\.json and b\.json"):
        build_scores(suite, PAPER, [one, replace(one, path=Path("b.json"))])


def test_the_papers_own_table(suite: Suite) -> None:
    table = build_scores(suite, PAPER, [], paper_only=True)
    assert len(table.rows) == 19
    for row in table.rows:  # the paper's averages are those of its ten scores (one is cut off, not rounded: 47.26)
        mean = sum(cell.value for cell in row.cells) / 10  # type: ignore[misc]
        assert row.average.value == pytest.approx(mean, abs=0.061)
    assert "carry the same ten scores" in to_markdown(table)


def test_formats_are_well_formed(suite: Suite, whole: list[results.Result]) -> None:
    table = build_scores(suite, PAPER, whole)
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {15}
    latex = to_latex(table)
    body = [line for line in latex.splitlines() if line.endswith(r"\\") and "&" in line and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in body} == {13}
    assert "–" not in latex


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [(289406976, "289M"), (1064828928, "1.06B"), (4_190_000, "4.2M"), (123_456, "123K"), (12, "12")],
)
def test_counts_are_printed_as_the_paper_prints_them(parameters: int, shown: str) -> None:
    assert short_count(parameters) == shown


def test_the_papers_shots_and_metric(suite: Suite) -> None:
    shots = {name: spec.shots for name, spec in suite.tasks.items()}
    assert shots == {
        **dict.fromkeys(("sciq", "piqa", "winogrande", "arc_easy", "logiqa", "lambada_openai"), 0),
        **{"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "mmlu": 5},
    }
    assert {spec.metric for spec in suite.tasks.values()} == {"acc"}
    assert set(PAPER["355m-dense"].scores) == {spec.paper_key for spec in suite.tasks.values()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shotz": 1}, r"unknown key 'shotz' in task 'sciq' \(did you mean 'shots'\?\)"),
        ({"shots": "five"}, "shots of task 'sciq' is 'five'; it must be of type int"),
        ({"shots": -1}, "must be 0 or more"),
        ({"folder": None}, "task 'sciq' lacks folder"),
    ],
)
def test_bad_task_file(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = yaml.safe_load((root / "eval" / "tasks.yaml").read_text(encoding="utf-8"))
    for key, value in change.items():
        data["tasks"]["sciq"].pop(key) if value is None else data["tasks"]["sciq"].__setitem__(key, value)
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_suite(path)
