"""Tables, figures and the page of a sweep, on records written by hand whose numbers are known."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mohd_train.errors import UserError
from mohd_train.evaluate import options, sweep_eval
from mohd_train.evaluate.sweep_eval import commands, run_sweep
from mohd_train.results import figures
from mohd_train.results import store as results
from mohd_train.results.paper import load_numbers
from mohd_train.results.report import write_report
from mohd_train.results.store import PERPLEXITY_FORMAT
from mohd_train.results.suite import load_suite
from mohd_train.results.sweep_results import mean, merged_tasks, read_sweep_results
from mohd_train.results.table import FORMS, Number, Table
from mohd_train.results.tables import TABLES, sweep_table, table_text
from mohd_train.sweep.data import DataSource
from mohd_train.sweep.expand import Choice, expand
from mohd_train.sweep.file import CONFIGS, read_sweep
from mohd_train.sweep.folder import SweepFolder

PAPER = load_numbers()


def make_sweep(
    path: Path, name: str, perplexity: Any, seeds: tuple[int, ...] = (1,), only: tuple[str, ...] = ()
) -> SweepFolder:
    """A launched sweep at the tiny scale whose runs ended with ``perplexity(setting, seed)``; None: not started, < 0: cut off."""
    sweep = read_sweep(CONFIGS / "sweep" / f"{name}.yaml")
    choice = Choice("tiny", seeds, only, ("max_duration=300ba",))
    runs = expand(sweep, choice, path)
    folder = SweepFolder(path)
    folder.claim(sweep, choice, DataSource(folder="data"), runs)
    for run in runs:
        value = perplexity(run.setting, run.seed)
        if value is None:
            continue
        write_run(path / run.name, run, abs(value), "finished" if value > 0 else "interrupted")
    return folder


def write_run(folder: Path, run: Any, perplexity: float, status: str) -> None:
    folder.mkdir()
    session = {"hardware": {"processes": 2, "device": "abacus"}}
    record = {
        "status": status,
        "batch": 300,
        "config": dataclasses.asdict(run.config),
        "sessions": [session],
        "versions": {"torch": "2"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = []
    for batch in (10, 20, 300 if status == "finished" else 30):
        line: dict[str, Any] = {
            "batch": batch,
            "tokens": 4096 * batch,
            "loss/train/cross_entropy": 3.0,
            "time/total": batch / 3000,
        }
        line["throughput/device/tokens_per_sec"] = 1000.0
        line["metrics/eval/LanguagePerplexity"] = perplexity * 300 / batch if status == "finished" else perplexity
        part = run.plan.ffn
        if part is not None:
            line["loss/train/balance"] = 0.08
            line |= {
                f"routing/layer{i}/ffn/share/{n}": 1.0 if n < part.shared else 0.2
                for i in range(4)
                for n in range(part.sub_dims)
            }
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def table(folder: SweepFolder, number: int) -> dict[str, dict[str, str]]:
    made = TABLES[number](PAPER, read_sweep_results(folder.path))
    rows = list(csv.DictReader(io.StringIO(made.to_csv())))
    return {row[made.headers[0]]: row for row in rows}


def store(folder: SweepFolder, run: str, task: str, score: float, **changes: Any) -> None:
    """A result as run_eval.py --sweep stores it."""
    suite = load_suite()
    spec = suite.tasks[task]
    settings = results.Settings(task, spec.shots, "acc", suite.seed, None, suite.lm_eval, "auto", "float32", "hub")
    model = {"name": run, "fingerprint": f"f-{run}", "activated": 754_000, "total": 1_500_000, "checkpoint": "c"}
    ours = {
        "format": results.FORMAT, "settings": dataclasses.asdict(dataclasses.replace(settings, **changes)), "model": model,
        "scores": {"acc": score, "acc_stderr": 0.01}, "questions": spec.questions, "subjects": spec.subjects,
        "truncated": {"requests": 0, "of": 9, "tokens": 0, "longest": 9},
    }  # fmt: skip
    path = folder.path / "eval" / run / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({results.KEY: ours, "results": {}}))


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
    assert "run_eval.py --perplexity" in " ".join(TABLES[4](PAPER, read_sweep_results(folder.path)).notes)


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


def test_results_asked_otherwise_are_named_and_not_averaged(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    store(folder, "tiny-355m-x2-s2", "sciq", 0.9, lm_eval="0.4.0")
    found = read_sweep_results(folder.path)
    assert [one.scores["acc"] for one in merged_tasks(found)] == [0.3]
    assert "asked in another way" in found.notes[-1]


def test_broken_results_are_named_and_set_aside(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, only=("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    (folder.path / "eval" / "tiny-355m-x2-s1" / "piqa.json").write_text('{"mohd_train": {')
    found = read_sweep_results(folder.path)
    assert set(found.runs[0].tasks) == {"sciq"}
    assert re.search(r"piqa.json is broken and set aside", found.notes[0])


@pytest.mark.parametrize("content", ["{}", '{"mohd_train": {"format": "another/1"}}'])
def test_a_file_of_no_known_kind_is_named(tmp_path: Path, content: str) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, only=("x2",))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    (folder.path / "eval" / "tiny-355m-x2-s1" / "piqa.json").write_text(content)
    assert re.search(r"piqa.json is broken and set aside", table_text(2, [folder.path], "md"))


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


def test_numbers_of_a_csv_stand_alone() -> None:
    made = Table("t", ["a", "b", "c"])
    made.add("one", Number(-0.25, signed=True), Number(10, error=0.5))
    made.add("two", None, Number(2, unfinished=True))
    assert made.to_csv() == "a,b,c,c stderr,unfinished\none,-0.25,10.00,0.50,\ntwo,,2.00,,c\n"
    assert "| one | −0.25 | 10.00 ± 0.50 |" in made.to_markdown()
    assert r"two & -- & 2.00 $\dagger$ \\" in made.to_latex()
    made.stress_least(2)
    assert made.bold == set()  # one finished number: nothing to be the least of


def test_the_suite_s_own_settings_decide_and_a_task_of_fewer_seeds_is_named(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2",))
    for task in load_suite().tasks:
        store(folder, "tiny-355m-x2-s1", task, 0.9, **({"shots": 3} if task == "sciq" else {}))
        store(folder, "tiny-355m-x2-s2", task, 0.3)
    found = read_sweep_results(folder.path)
    merged = {one.settings.task: one for one in merged_tasks(found)}
    assert (merged["sciq"].scores["acc"], merged["piqa"].scores["acc"]) == (0.3, pytest.approx(0.6))
    assert "x2-s1/sciq.json was asked in another way" in found.notes[0]
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
    assert "logiqa could not be had: script data set" in text
    assert "no network" not in text
    assert re.search(r"boolq\.missing\.json cannot be read .* \(set aside\)", text)
    metrics = folder.path / "tiny-355m-x2-s1" / "metrics.jsonl"
    metrics.write_text('{"batch": 1, "tok\n[]\n' + metrics.read_text() + '{"batch": 9')  # the last: being written
    found = read_sweep_results(folder.path)
    assert len(found.runs[0].metrics) == 3
    assert [note for note in found.notes if "metrics.jsonl, line 1 and 1 more: no valid JSON of a batch" in note]


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


class Page(HTMLParser):
    """Counts elements, and refuses a page that is not closed in order."""

    void = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda setting, seed: TABLE4.get(setting))
    path = write_report(folder.path)
    assert path == folder.path / "report.html"
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert (folder.path / "figures" / "load_tiny-355m-x2-s1.png").exists()
    assert not (folder.path / "figures" / "load_tiny-355m-dense-s1.png").exists()
    assert page.seen.count("img") >= 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text.replace("https://www.w3.org", "")
    for words in ("abacus", "+0.17", "prefers-color-scheme: dark", "x2-no-scaling", "1,", "device hours together"):
        assert words in text
    # 300 batches / 3000 per hour on 2 devices, five runs
    assert "1 device hours together" in text


def test_grid_escapes(tmp_path: Path) -> None:
    made = Table("a <b>", ["x & y", "n_1"], [["50% <i>", "1"]], ["#1"])
    assert "&lt;i&gt;" in made.to_html()
    assert r"50\% <i> & 1 \\" in made.to_latex()
    assert r"x \& y & n\_1" in made.to_latex()


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


def test_sweep_evaluation_commands(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "s", "table4", lambda s, seed: {"x2": 10.0, "dense": -9.0}.get(s), only=("x2", "dense")
    )
    asked = options.parse(None, ["--sweep", str(folder.path), "--perplexity", "--limit", "3", "--jobs", "2"])
    assert isinstance(asked, options.SweepEvalOptions)
    assert (asked.jobs, asked.words) == (2, ["--perplexity", "--limit", "3"])
    found = commands(folder, asked.words)
    assert list(found) == ["tiny-355m-x2-s1"]
    words = found["tiny-355m-x2-s1"]
    one = options.parse(None, words[2:])
    assert isinstance(one, options.PerplexityOptions)
    assert (one.name, one.data, one.limit) == ("tiny-355m-x2-s1", Path("data"), 3)
    assert one.output == folder.path / "eval"
    other = make_sweep(tmp_path / "t", "table4", lambda s, seed: None, only=("x2",))
    with pytest.raises(UserError, match="has no finished run"):
        run_sweep(options.SweepEvalOptions(other.path, 1, []))


def test_sweep_evaluation_gives_each_job_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two GPUs, four runs: never two at once on one, one that fails does not stop the others."""
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0)
    names = list(folder.runs)[:4]
    log = tmp_path / "used"
    program = (
        "import os, sys, time, pathlib; gpu = os.environ['CUDA_VISIBLE_DEVICES']; lock = pathlib.Path(sys.argv[1] + gpu);"
        "lock.mkdir(); time.sleep(0.3); lock.rmdir(); open(sys.argv[1], 'a').write(gpu + '\\n');"
        "sys.exit('error: out of rows' if sys.argv[2] == 'fail' else 0)"
    )
    asked = {name: [sys.executable, "-c", program, str(log), "fail" if name == names[0] else "go"] for name in names}
    monkeypatch.setattr(sweep_eval, "commands", lambda folder, words: dict(asked))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert run_sweep(options.SweepEvalOptions(folder.path, None, [])) == 1  # one a GPU without --jobs
    assert sorted(set(log.read_text().split())) == ["3", "5"]
    assert len(log.read_text().split()) == 4
    shown = capsys.readouterr().out
    assert f"{names[0]}: failed: error: out of rows" in shown
    assert shown.count(": evaluated") == 3
    log.unlink()
    assert run_sweep(options.SweepEvalOptions(folder.path, 1, [])) == 1
    assert log.read_text().split() == ["3"] * 4
    with pytest.raises(UserError, match="and there are 2"):
        run_sweep(options.SweepEvalOptions(folder.path, 3, []))


@pytest.mark.parametrize(
    "words",
    [["--jobs", "2"], ["--sweep", "d", "--name", "x"], ["--sweep", "d", "--jobs", "0"], ["--sweep", "d", "--nonsense"]],
)
def test_sweep_evaluation_usage_errors(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options.parse(None, words)
    assert caught.value.code == 2
