"""Data frames of everything measured: of a sweep, of stored results, of curves; on files of an earlier version too."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas
import pytest
from support.sweep_results import make_sweep, store

from mohd_train import results
from mohd_train.errors import UserError
from mohd_train.results.tables import table_text

OLD = Path(__file__).parent / "old"  # as commit 96e0c63 wrote them


def test_a_row_for_each_seed_task_and_metric(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: -9.0 if (s, seed) == ("dense", 2) else 10.0, (1, 2))
    store(folder, "tiny-355m-x2-s1", "sciq", 0.3)
    store(folder, "tiny-355m-x2-s2", "sciq", 0.4, shots=3)
    store(folder, "tiny-355m-dense-s2", "sciq", 0.2)
    frame = results.load(folder.path)
    assert not frame.duplicated(["model", "seed", "task", "part", "metric"]).any()
    acc = frame[frame["metric"] == "acc"].set_index("run")
    assert acc["value"].to_dict() == {"tiny-355m-x2-s1": 0.3, "tiny-355m-x2-s2": 0.4, "tiny-355m-dense-s2": 0.2}
    one = acc.loc["tiny-355m-x2-s1"]
    assert (one["model"], one["setting"], one["seed"], one["stderr"], one["n"]) == ("tiny-355m-x2", "x2", 1, 0.01, 1000)
    assert acc["notes"].to_dict() == {
        "tiny-355m-x2-s1": "",
        "tiny-355m-x2-s2": "other shots: sciq 3, not 0",
        "tiny-355m-dense-s2": "not trained to its end: tiny-355m-dense-s2 stopped, batch 30",
    }
    validation = frame[frame["task"] == "validation"]
    assert len(validation) == len(folder.runs)
    assert set(validation["value"]) == {9.0, 10.0}
    assert validation["activated"].notna().all()
    # what the tables print is the mean over seeds of these rows
    means = validation[validation["notes"] == ""].groupby("model")["value"].mean()
    assert means["tiny-355m-x2"] == 10.0
    assert "tiny-355m-dense-s2 is not finished (stopped, batch 30 of 300)" in frame.attrs["notes"]


def test_results_of_an_earlier_version_keep_their_numbers() -> None:
    """Values and standard errors that commit 96e0c63 printed from these files."""
    scores = results.load([OLD / "sweep", OLD / "results"])
    found = {(row.run, row.model, row.task, row.metric): row for row in scores.itertuples() if row.metric != "loss"}
    assert found[pandas.NA, "llama", "sciq", "acc"].value == 0.125
    assert found[pandas.NA, "llama", "sciq", "acc"].stderr == pytest.approx(0.125)
    assert found[pandas.NA, "llama", "sciq", "acc"].notes == "not all of the task's questions: sciq 8 of 1000"
    missing = found[pandas.NA, "llama", "logiqa", "acc"]
    assert pandas.isna(missing.value)
    assert missing.notes == "logiqa was unavailable: Dataset scripts are no longer supported"
    assert found["tiny-355m-x2-s1", "tiny-355m-x2", "mmlu", "acc"].value == 0.5
    measured = scores.query("task == 'perplexity' and metric == 'perplexity'").groupby("model")["value"]
    assert measured.mean().round(2).to_dict() == {"tiny-355m-dense": 167.81, "tiny-355m-x2": 65.39}
    assert measured.sem()["tiny-355m-x2"] == pytest.approx(1.67, abs=0.005)
    assert set(scores.query("task == 'perplexity'")["notes"]) == {"run with --limit 1 (batches of unknown size)"}
    assert scores["checkpoint"].dropna().str.endswith((".pt", "llama")).all()


def test_tables_of_an_earlier_version_keep_their_numbers() -> None:
    (row,) = (r for r in csv.DictReader(io.StringIO(table_text(2, [OLD / "results"], "csv"))) if r["row"] == "ours")
    assert (row["label"], row["activated"], row["total"], row["sciq"], row["piqa"]) == (
        "llama",
        "9K",
        "47K",
        "12.5",
        "",
    )
    rows = {row["Method"]: row for row in csv.DictReader(io.StringIO(table_text(4, [OLD / "sweep"], "csv")))}
    assert (rows["MoHD x2 -710M"]["PPL"], rows["MoHD x2 -710M"]["PPL stderr"]) == ("65.39", "1.67")
    dense = rows["LLaMA2-355M"]
    assert (dense["PPL"], dense["Δ"], dense["Difference of Δ"]) == ("167.81", "+102.43", "+101.07")
    assert "| tiny-355m-dense | 128 | 320 | 4 | 4 | 4 | 754K | 907K |" in table_text(1, [OLD / "sweep"], "md")
    text = table_text(2, [OLD / "sweep"], "md")
    assert "demo questions, not the task's own: the number is not meaningful" in text
    assert "355m-x2 mmlu: of 1 seeds, not 2" in text


def test_parts_are_subjects_and_domains() -> None:
    whole, parts = results.load(OLD / "sweep"), results.load(OLD / "sweep", parts=True)
    assert whole["part"].isna().all()
    pandas.testing.assert_frame_equal(parts[parts["part"].isna()].reset_index(drop=True), whole)
    subjects = parts.query("task == 'mmlu' and part.notna()")
    assert set(subjects["part"]) == {"astronomy", "nutrition", "high_school_geography"}
    macro = whole.query("task == 'mmlu' and metric == 'acc_macro'")["value"]
    assert subjects["value"].mean() == pytest.approx(macro.item())
    one = parts.query("run == 'tiny-355m-x2-s1' and task == 'perplexity' and metric == 'loss'").set_index("part")
    domains = one[one.index.notna()]
    total = one[one.index.isna()]
    assert set(domains.index) == {"cc", "wiki"}
    assert domains["n"].sum() == total["n"].item()
    assert (domains["value"] * domains["n"]).sum() / domains["n"].sum() == pytest.approx(total["value"].item())


def test_a_file_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sciq.json").write_text((OLD / "results" / "llama" / "sciq.json").read_text())
    (tmp_path / "b" / "sciq.json").write_text("{")
    (tmp_path / "b" / "perplexity.json").write_text(json.dumps({"mohd_train": {"format": "other/1"}}))
    with pytest.warns(UserWarning, match=r"b/sciq\.json is not valid JSON .* \(set aside\)"):
        frame = results.load(tmp_path)
    assert len(frame) == 2
    assert [note.partition(" ")[0].rpartition("/")[2] for note in frame.attrs["notes"]] == [
        "sciq.json",
        "perplexity.json",
    ]
    with pytest.raises(UserError, match=r"sciq\.json is not valid JSON"):
        results.load(tmp_path / "b" / "sciq.json")
    with pytest.raises(UserError, match="not a perplexity result"):
        results.load(tmp_path / "b" / "perplexity.json")
    with pytest.raises(UserError, match="no results at"):
        results.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no results"):
        results.load(tmp_path / "empty")


def test_perplexities_alone_are_results(tmp_path: Path) -> None:
    file = tmp_path / "x2" / "perplexity.json"
    file.parent.mkdir()
    file.write_text((OLD / "sweep" / "eval" / "tiny-355m-x2-s1" / "perplexity.json").read_text())
    frame = results.load(tmp_path)
    assert frame["metric"].tolist() == ["perplexity", "loss"]
    assert frame["model"].tolist() == ["tiny-355m-x2-s1"] * 2
    pandas.testing.assert_frame_equal(results.load(file), frame)


def test_curves_are_the_lines_of_the_metrics_files(tmp_path: Path) -> None:
    curves = results.load_curves(OLD / "sweep", metrics=["loss/train/*"])
    assert list(curves.columns[6:]) == ["loss/train/total", "loss/train/cross_entropy", "loss/train/balance"]
    assert curves.groupby("run").size().to_dict() == {f"tiny-355m-{run}": 4 for run in ("dense-s1", "x2-s1", "x2-s2")}
    lines = [
        json.loads(line) for line in (OLD / "sweep" / "tiny-355m-x2-s2" / "metrics.jsonl").read_text().splitlines()
    ]
    one = curves[curves["run"] == "tiny-355m-x2-s2"]
    assert one["tokens"].tolist() == [line["tokens"] for line in lines]
    assert one["loss/train/cross_entropy"].tolist() == [line["loss/train/cross_entropy"] for line in lines]
    assert set(one["model"]) == {"tiny-355m-x2"}
    assert set(one["seed"]) == {2}

    alone = results.load_curves(OLD / "sweep" / "tiny-355m-x2-s2", metrics=["loss/train/*"])  # no sweep around it
    assert (alone["model"].iloc[0], alone["seed"].iloc[0]) == ("tiny-355m-x2", 2)
    values = ["batch", "tokens", "loss/train/cross_entropy"]
    pandas.testing.assert_frame_equal(alone[values], one[values].reset_index(drop=True))
    validated = results.load_curves(OLD / "sweep" / "tiny-355m-x2-s2", metrics=["metrics/eval/*"])
    assert validated["batch"].tolist() == [2, 4]  # batches without validation have no row
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        results.load_curves(tmp_path)
    with pytest.raises(UserError, match="the run folder is s3://"):
        results.load_curves("s3://bucket/runs")


def test_a_broken_line_of_a_curve_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"batch": 1, "tokens": 8, "a": 1.0}\n{"batch"\n{"batch": 3')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2: not the JSON of a batch"):
        curves = results.load_curves(tmp_path)
    assert curves["a"].tolist() == [1.0]


def test_results_tables_figures_and_status_import_nothing_heavy(root: Path) -> None:
    """A table, a figure, a status opens at once: no torch (nor its distributed part), Composer, lm-eval or client of storage."""
    heavy = (
        "torch",
        "torch.distributed",
        "composer",
        "streaming",
        "transformers",
        "datasets",
        "lm_eval",
        "boto3",
        "botocore",
    )
    modules = [
        "results",
        "results.tables",
        "results.figures",
        "results.report",
        "results.sweep_results",
        "sweep.status",
    ]
    program = (
        "import sys\nfrom mohd_train.results import load, load_curves\n"
        "from mohd_train.results.tables import table_text\n"
        + "".join(f"import mohd_train.{name}\n" for name in modules)
        + f"table_text(1, [{str(OLD / 'sweep')!r}], 'md'); table_text(2, [{str(OLD / 'results')!r}], 'md')\n"
        f"load({str(OLD / 'sweep')!r}); load_curves({str(OLD / 'sweep')!r})\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_the_code_of_the_documentation_runs(root: Path, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda s, seed: 10.0, (1, 2), ("x2", "dense"))
    for seed, value in ((1, 0.3), (2, 0.4)):
        store(folder, f"tiny-355m-x2-s{seed}", "sciq", value)
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for path in ("eval/results", "runs/sweep/table4-tiny"):
        assert f'"{path}"' in code
        code = code.replace(f'"{path}"', repr(str(folder.path)))
    names: dict[str, Any] = {}
    plt.switch_backend("Agg")
    exec(code.replace("comparable.pivot_table", "pivot = comparable.pivot_table"), names)
    plt.close("all")
    assert names["pivot"].loc["tiny-355m-x2"].to_dict() == {
        ("mean", "sciq"): pytest.approx(0.35),
        ("sem", "sciq"): pytest.approx(0.05),
    }
    assert list(names["loss"].columns) == ["tiny-355m-dense", "tiny-355m-x2"]


def test_plot_script(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["plot_results.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "docs" / "plot_results.py"), run_name="__main__")
        return int(ended.value.code or 0)  # type: ignore[arg-type]

    asked = ("--task", "perplexity", "--metric", "perplexity", "--output", tmp_path / "plot.png")
    assert call(OLD / "sweep", *asked) == 0
    shown = capsys.readouterr().out
    assert "not comparable with the paper: run with --limit 1" in shown
    x2 = next(line.split() for line in shown.splitlines() if line.startswith("tiny-355m-x2"))
    assert (float(x2[1]), float(x2[2]), x2[3]) == (pytest.approx(65.39, abs=0.005), pytest.approx(1.67, abs=0.005), "2")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert call(OLD / "results", "--output", tmp_path / "acc.png") == 0
    assert (tmp_path / "acc.png").exists()
    assert call(OLD / "results", "--metric", "bleu") == 1
    assert "has no bleu" in capsys.readouterr().err
