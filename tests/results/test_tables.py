"""The paper's tables from a sweep whose numbers are known."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from support.sweep_results import make_sweep, store

from mohd_train.errors import UserError
from mohd_train.results import figures
from mohd_train.results import store as results
from mohd_train.results.paper import load_numbers
from mohd_train.results.report import write_report
from mohd_train.results.store import PERPLEXITY_FORMAT
from mohd_train.results.suite import load_suite
from mohd_train.results.sweep_results import mean, merged_tasks, read_sweep_results
from mohd_train.results.table import FORMS
from mohd_train.results.tables import TABLES, sweep_table, table_text
from mohd_train.sweep.folder import SweepFolder

PAPER = load_numbers()


def table(folder: SweepFolder, number: int) -> dict[str, dict[str, str]]:
    made = TABLES[number](PAPER, read_sweep_results(folder.path))
    rows = list(csv.DictReader(io.StringIO(made.to_csv())))
    return {row[made.headers[0]]: row for row in rows}


TABLE4 = {"x2": 10.0, "x2-no-shared": 11.0, "x2-no-balance": 10.5, "x2-no-fusion": 10.25, "dense": 12.0}


def test_table4_ours_theirs_and_the_difference(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda setting, seed: TABLE4.get(setting))
    rows = table(folder, 4)
    assert rows["MoHD x2 -710M"]["PPL"] == "10.00"
    shared = rows["without mixed (shared) sub-dimensions"]
    assert (shared["PPL"], shared["Δ"], shared["Δ, paper"], shared["Difference of Δ"]) == (
        "11.00",
        "+1.00",
        "+0.83",
        "+0.17",
    )
    assert rows["LLaMA2-355M"]["Difference of Δ"] == "+0.64"
    scaling = rows["without sub-dimension scaling"]
    assert (scaling["PPL"], scaling["Δ"], scaling["PPL, paper"]) == ("", "", "11.41")  # not trained: missing, never 0
    text = TABLES[4](PAPER, read_sweep_results(folder.path)).to_markdown()
    assert "**10.00**" in text
    assert "| without sub-dimension scaling | – | – |" in text


def test_seeds_give_mean_and_standard_error(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", "table4", lambda s, seed: {1: 9.0, 2: 11.0}[seed] if s == "x2" else 12.0, (1, 2)
    )
    row = table(folder, 4)["MoHD x2 -710M"]
    assert (row["PPL"], row["PPL stderr"]) == ("10.00", "1.00")
    assert "| **10.00 ± 1.00** |" in TABLES[4](PAPER, read_sweep_results(folder.path)).to_markdown()
    assert mean([2.0]).error is None  # type: ignore[union-attr]
    assert mean([]) is None


def test_half_finished_runs_are_marked_and_never_averaged_with_whole_ones(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", "table4", lambda s, seed: -50.0 if (s, seed) == ("x2", 2) or s == "dense" else 10.0, (1, 2)
    )
    found = read_sweep_results(folder.path)
    rows = table(folder, 4)
    assert rows["MoHD x2 -710M"]["PPL"] == "10.00"
    dense = rows["LLaMA2-355M"]
    assert (dense["PPL"], dense["PPL stderr"], dense["unfinished"]) == ("50.00", "0.00", "PPL; Δ; Difference of Δ")
    assert rows["MoHD x2 -710M"]["unfinished"] == ""
    text = TABLES[4](PAPER, found).to_markdown()
    assert "| LLaMA2-355M | 50.00 ± 0.00 † | +40.00 † | 11.61 | +1.36 | +38.64 † |" in text
    assert "tiny-355m-x2: the perplexity is of 1 seeds, not 2." in text
    assert "tiny-355m-x2-s2 is not finished (stopped, batch 30 of 300)" in found.notes
    assert "† not finished." in sweep_table(found).notes


def test_table5_and_activated_parameters(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table5", lambda s, seed: {"dense": 11.61, "attn50-ffn100": 12.0}.get(s, 11.0))
    rows = table(folder, 5)
    assert len(rows) == 8
    row = rows["50% - 100%"]
    assert (row["Δ"], row["Δ, paper"], row["Difference of Δ"]) == ("+0.39", "+0.64", "-0.25")
    assert "−0.25" in TABLES[5](PAPER, read_sweep_results(folder.path)).to_markdown()
    assert row["# Activate"] != row["# Activate, paper"] == "239M"


@pytest.mark.parametrize("number", [1, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_the_paper_s_own_tables(number: int, form: str) -> None:
    text = table_text(number, [], form)
    assert {1: "396M", 3: "75", 4: "10.47", 5: "14.31"}[number] in text
    if form == "latex":
        body = [line for line in text.splitlines() if line.endswith(r"\\") and "&" in line]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1


def test_table3_sets_ours_beside_the_paper_s(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table2", lambda s, seed: None, only=("75", "x3"))
    rows = table(folder, 3)
    assert (rows["75%"]["Attention N"], rows["75%, paper"]["Attention N"]) == ("16", "12")
    assert (rows["75%"]["Active"], rows["75%, paper"]["Active"]) == ("75%", "33%")
    assert rows["x3"]["Group fusion dim"] == rows["x3, paper"]["Group fusion dim"] == "12"


def test_stored_perplexity_is_used_when_every_run_has_it(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, only=("x2", "dense"))
    names = list(folder.runs)

    def put(name: str, value: float) -> None:
        path = folder.path / "eval" / name / "perplexity.json"
        path.parent.mkdir(parents=True)
        content = {"format": PERPLEXITY_FORMAT, "settings": {"data": "d"}, "total": {"perplexity": value}}
        path.write_text(json.dumps({results.KEY: content}))

    put(names[0], 7.0)
    assert table(folder, 4)["MoHD x2 -710M"]["PPL"] == "10.00"  # one column, one source
    put(names[1], 8.0)
    assert table(folder, 4)["MoHD x2 -710M"]["PPL"] == "7.00"
    assert "mohd eval --perplexity" in " ".join(TABLES[4](PAPER, read_sweep_results(folder.path)).notes)


def test_table2_of_a_sweep_with_seeds(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2",))
    for task in load_suite().tasks:
        store(folder, "tiny-355m-x2-s1", task, 0.3)
        store(folder, "tiny-355m-x2-s2", task, 0.4)
    text = table_text(2, [folder.path], "csv")
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(text))}
    assert (rows["ours"]["sciq"], rows["paper"]["sciq"], rows["difference"]["sciq"]) == ("35.0", "76.6", "-41.6")
    assert rows["ours"]["sciq_stderr"] == rows["ours"]["average_stderr"] == "5.0"  # over the two seeds
    assert "| 35.0 ± 5.0 |" in table_text(2, [folder.path], "md")
    assert "± is the standard error over seeds of 355m-x2 (2)." in table_text(2, [folder.path], "md")
    assert "tiny scale" in table_text(2, [folder.path], "md")
    assert figures.draw_scores(read_sweep_results(folder.path), tmp_path / "f")


@pytest.mark.parametrize("content", ["{}", '{"mohd_train": {"format": "another/1"}}'])
def test_a_file_of_no_known_kind_is_named(tmp_path: Path, content: str) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, only=("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    (folder.path / "eval" / "tiny-355m-x2-s1" / "piqa.json").write_text(content)
    assert re.search(r"piqa.json is broken and set aside", table_text(2, [folder.path], "md"))


def test_the_suite_s_own_settings_decide_and_a_task_of_fewer_seeds_is_named(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2",))
    for task in load_suite().tasks:
        store(folder, "tiny-355m-x2-s1", task, 0.9, **({"shots": 3} if task == "sciq" else {}))
        store(folder, "tiny-355m-x2-s2", task, 0.3)
    found = read_sweep_results(folder.path)
    merged = {one.settings.task: one for one in merged_tasks(found)}
    assert (merged["sciq"].scores["acc"], merged["piqa"].scores["acc"]) == (0.3, pytest.approx(0.6))
    assert "x2-s1/sciq.json was evaluated with other settings" in found.notes[0]
    assert "355m-x2 sciq: of 1 seeds, not 2" in found.notes
    text = table_text(2, [folder.path], "csv")
    (ours,) = (row for row in csv.DictReader(io.StringIO(text)) if row["row"] == "ours")  # one row, whatever its seeds
    assert (ours["sciq"], ours["piqa"], ours["label"]) == ("30.0", "60.0", "355m-x2")
    assert figures.draw_scores(found, tmp_path / "f")
    store(folder, "tiny-355m-x2-s1", "sciq", 0.9, lm_eval="0.4.0")
    store(folder, "tiny-355m-x2-s2", "sciq", 0.9, lm_eval="0.4.0")
    text = table_text(2, [folder.path], "csv")
    (ours,) = (row for row in csv.DictReader(io.StringIO(text)) if row["row"] == "ours")
    assert (ours["sciq"], ours["average"]) == ("", "")
    assert figures.draw_scores(read_sweep_results(folder.path), tmp_path / "f") == []  # no average of nine tasks


def test_scores_of_half_finished_runs_are_marked_and_left_out_of_means(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", "table4", lambda s, seed: -9.0 if (s, seed) == ("x2", 1) or s == "dense" else 9.0, (1, 2)
    )
    for run in ("x2-s1", "x2-s2", "dense-s1", "dense-s2"):
        store(folder, f"tiny-355m-{run}", "sciq", 0.2 if run.endswith("1") else 0.4)
    found = read_sweep_results(folder.path)
    merged = {one.model["name"]: one for one in merged_tasks(found)}
    assert merged["355m-x2"].scores["acc"] == 0.4
    assert merged["355m-dense"].scores["acc"] == pytest.approx(0.3)
    assert any("x2-s1/sciq.json is not of a finished run" in note for note in found.notes)
    assert "not trained to its end: 355m-dense stopped, batch 30" in table_text(2, [folder.path], "md")


def test_why_a_task_is_missing_stands_below_the_table(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, only=("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    place = folder.path / "eval" / "tiny-355m-x2-s1"
    model = results.read(place / "sciq.json").model
    results.write_missing(place, "logiqa", model, "script data set")
    results.write_missing(place, "sciq", model, "no network")  # there already: stands
    (place / "boolq.missing.json").write_text("{")
    text = table_text(2, [folder.path], "md")
    assert "logiqa was unavailable: script data set" in text
    assert "no network" not in text
    assert re.search(r"boolq\.missing\.json cannot be read .* \(set aside\)", text)
    metrics = folder.path / "tiny-355m-x2-s1" / "metrics.jsonl"
    metrics.write_text('{"batch": 1, "tok\n[]\n' + metrics.read_text() + '{"batch": 9')  # the last: being written
    found = read_sweep_results(folder.path)
    assert len(found.runs[0].metrics) == 3
    assert [note for note in found.notes if "metrics.jsonl, line 1 and 1 more: not the JSON of a batch" in note]


def test_no_sweep_there(tmp_path: Path) -> None:
    for call in (
        lambda: write_report(tmp_path),
        lambda: table_text(4, [tmp_path], "md"),
        lambda: figures.draw_all(tmp_path, tmp_path),
    ):
        with pytest.raises(UserError, match="is not the folder of a launched sweep"):
            call()
    with pytest.raises(UserError, match="Table 4 is of one sweep"):
        table_text(4, [tmp_path, tmp_path], "md")
