"""The runner: what it stores, reuses and refuses; checkpoints of either kind; the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.native import save_native, swap_words
from support.plans import small_plan
from support.s3_server import BUCKET, S3Server
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohd_train.analysis.subject import load_subject
from mohd_train.checkpoint import open as open_checkpoint
from mohd_train.checkpoint.identity import fingerprint, tokenizer_sha256
from mohd_train.errors import UserError
from mohd_train.evaluate import load as checkpoints
from mohd_train.evaluate.options import EvalOptions
from mohd_train.evaluate.run import run_eval
from mohd_train.hf.export import export
from mohd_train.model.count import count
from mohd_train.model.llama import Transformer
from mohd_train.results import store as results
from mohd_train.results.suite import Suite
from mohd_train.results.tables import subjects_text, table_text


@pytest.fixture
def options(llama: Path, demo_questions: Path, tmp_path: Path) -> EvalOptions:
    return EvalOptions(llama, tmp_path / "out", ["sciq", "boolq"], demo_questions, device="cpu", limit=4)


def stored(options: EvalOptions, task: str = "sciq", name: str = "tiny-llama") -> Path:
    return options.output / name / f"{task}.json"


def test_stores_one_file_a_task_with_its_origin(options: EvalOptions, llama: Path, suite: Suite) -> None:
    assert run_eval(options, suite) == 0
    assert sorted(p.name for p in (options.output / "tiny-llama").iterdir()) == ["boolq.json", "sciq.json"]
    data = json.loads(stored(options).read_text(encoding="utf-8"))
    ours = data["mohd_train"]
    assert data["n-shot"]["sciq"] == 0  # lm-eval's own JSON, with one more key
    assert ours["model"]["checkpoint"] == str(llama.resolve())
    assert ours["model"]["max_length"] == 512
    assert ours["settings"]["limit"] == 4
    assert ours["settings"]["demo"] is True
    assert ours["versions"]["lm_eval"] == suite.lm_eval
    assert set(ours["files"]) == {"test"}
    assert ours["files"]["test"]["rows"] == 8
    assert (ours["questions"], ours["questions_available"]) == (4, 8)
    result = results.read(stored(options))
    assert set(result.scores) >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert results.find([options.output]).results == [results.read(stored(options, "boolq")), result]


def test_reuses_what_is_stored(options: EvalOptions, suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    run_eval(options, suite)
    before = stored(options).stat().st_mtime_ns
    options.tasks = ["sciq", "arc_easy"]
    capsys.readouterr()
    run_eval(options, suite)
    shown = capsys.readouterr().out
    assert "sciq: acc" in shown
    assert shown.count("reused") == 1
    assert stored(options).stat().st_mtime_ns == before
    assert stored(options, "arc_easy").exists()


def test_refuses_to_replace_another_result(
    options: EvalOptions, suite: Suite, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    run_eval(options, suite)
    options.limit = None
    with pytest.raises(UserError, match=r"made with other settings.*limit: 4 there, None now"):
        run_eval(options, suite)
    options.limit, options.checkpoint = 4, make_llama(seed=1)
    with pytest.raises(UserError, match="holds the result of another checkpoint"):
        run_eval(options, suite)
    assert results.read(stored(options)).settings.limit == 4
    options.overwrite = True
    assert run_eval(options, suite) == 0
    assert results.read(stored(options)).model["checkpoint"] == str(options.checkpoint.resolve())


@pytest.mark.parametrize("how", ["--tokenizer", "edited"])
def test_another_tokenizer_is_another_measurement(options: EvalOptions, suite: Suite, tmp_path: Path, how: str) -> None:
    """The same ids for other words: the stored score says nothing of it."""
    options.checkpoint = Path(shutil.copytree(options.checkpoint, tmp_path / "model"))
    run_eval(options, suite)
    if how == "edited":
        place = options.checkpoint
    else:
        place = options.tokenizer = Path(shutil.copytree(options.checkpoint, tmp_path / "other"))
    file = place / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"other settings \(tokenizer: v2:[0-9a-f]{64} there, v2:[0-9a-f]{64} now\)"):
        run_eval(options, suite)
    options.overwrite = True
    assert run_eval(options, suite) == 0
    options.overwrite = False
    assert run_eval(options, suite) == 0


def test_results_stored_before_are_read_and_not_reused(
    options: EvalOptions, suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hold no hash of the tokenizer, and a fingerprint that did not look at all weights."""
    run_eval(options, suite)
    before = table_text(2, [options.output], "csv")
    for task in ("sciq", "boolq"):
        data = json.loads(stored(options, task).read_text(encoding="utf-8"))
        del data["mohd_train"]["settings"]["tokenizer"]
        data["mohd_train"]["model"]["fingerprint"] = "0123456789abcdef"
        stored(options, task).write_text(json.dumps(data), encoding="utf-8")
    assert results.read(stored(options)).settings.tokenizer == ""
    assert table_text(2, [options.output], "csv") == before
    with pytest.raises(UserError, match=r"sciq\.json was stored by an earlier version.*give --overwrite"):
        run_eval(options, suite)
    options.overwrite = True
    assert run_eval(options, suite) == 0


def test_changed_rows_are_another_measurement(options: EvalOptions, suite: Suite, tmp_path: Path) -> None:
    run_eval(options, suite)
    options.data_dir = Path(shutil.copytree(str(options.data_dir), tmp_path / "rows"))
    path = options.data_dir / "sciq" / "test.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("roots", "roots,"), encoding="utf-8")
    with pytest.raises(UserError, match="rows: "):
        run_eval(options, suite)


def test_a_broken_result_is_named_and_set_aside(
    options: EvalOptions, suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval(options, suite)
    whole = stored(options).read_text(encoding="utf-8")
    for broken in (
        whole[:40],
        whole.replace('"fingerprint"', '"finger"'),
        whole.replace('"acc": ', '"acc": "x", "a": '),
    ):
        stored(options).write_text(broken, encoding="utf-8")
        found = results.find([options.output])
        assert [one.settings.task for one in found.results] == ["boolq"]
        assert "sciq.json" in found.notes[0]
        assert found.notes[0].endswith("(set aside)")
        with pytest.raises(UserError, match=r"sciq\.json"):
            results.find([stored(options)])
        capsys.readouterr()
        assert run_eval(options, suite) == 0
        shown = capsys.readouterr().out
        assert "set aside as sciq.json.broken, evaluated again" in shown
        assert shown.count("reused") == 1
        assert stored(options).with_name("sciq.json.broken").read_text(encoding="utf-8") == broken
        assert results.read(stored(options)).questions == 4
    assert "broken" not in table_text(2, [options.output], "md")


@pytest.mark.parametrize("content", ["{}", "[]", '{"mohd_train": {}}', '{"results": {"sciq": {"acc,none": 0.5}}}'])
def test_a_file_in_the_place_of_a_result_is_named(
    content: str, options: EvalOptions, suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval(options, suite)
    stored(options).write_text(content, encoding="utf-8")
    stored(options).with_name("other.json").write_text(content, encoding="utf-8")
    assert re.search(r"sciq\.json is not a result of mohd eval .* \(set aside\)", table_text(2, [options.output], "md"))
    assert "other.json" not in table_text(2, [options.output], "md")
    capsys.readouterr()
    assert run_eval(options, suite) == 0
    assert "set aside as sciq.json.broken" in capsys.readouterr().out


def test_what_a_tokenizer_appends_is_left_out_and_part_of_the_settings(
    options: EvalOptions, suite: Suite, make_llama: Callable[..., Path]
) -> None:
    """A result that an earlier version made with EOS in each answer is not taken for this measurement."""
    run_eval(options, suite)
    expected = results.read(stored(options)).scores
    options.checkpoint, options.output = make_llama(adds_eos=True), Path(str(options.output) + "-eos")
    run_eval(options, suite)
    result = results.read(stored(options))
    assert (result.scores, result.settings.dropped) == (expected, "</s>")
    old = json.loads(stored(options).read_text(encoding="utf-8"))
    del old["mohd_train"]["settings"]["dropped"]
    stored(options).write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(UserError, match=r"made with other settings \(dropped:  there, </s> now\)"):
        run_eval(options, suite)


def test_joined_answers_are_stored_and_shown(
    options: EvalOptions, suite: Suite, make_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options.checkpoint, options.tasks = make_llama(words=False, vocab_size=2000), ["mmlu", "sciq"]
    assert run_eval(options, suite) == 0
    shown = capsys.readouterr().out
    result = results.read(stored(options, "mmlu"))
    count = result.joined["requests"]
    assert 0 < result.joined["alone"] <= count <= result.truncated["of"]
    assert f"{count} answers share a token with their question" in shown
    assert f"{count}/{result.truncated['of']}" in shown
    macro = f"{100 * result.scores['acc_macro']:.1f} ± {100 * result.scores['acc_macro_stderr']:.1f}"
    assert re.search(rf"by subject +{result.subjects} +{macro}", shown)
    marked = table_text(2, [options.output], "md")
    assert f", tiny-llama mmlu {count} of {result.truncated['of']} ({result.joined['alone']} encoded alone)" in marked


def test_subjects_are_a_table(options: EvalOptions, suite: Suite) -> None:
    options.tasks, options.limit = ["mmlu", "sciq"], None
    run_eval(options, suite)
    result = results.read(stored(options, "mmlu"))
    rows = {row["Subject"]: row for row in csv.DictReader(io.StringIO(subjects_text([options.output], "csv")))}
    assert set(rows) == {*result.subject_scores, "mean over questions", "mean over subjects"}
    for subject, scores in result.subject_scores.items():
        assert rows[subject]["tiny-llama"] == f"{100 * scores['acc']:.1f}"
        assert rows[subject]["Questions"] == f"{scores['questions']:.0f}"
    assert rows["mean over subjects"]["tiny-llama"] == f"{100 * result.scores['acc_macro']:.1f}"
    assert rows["mean over questions"]["tiny-llama stderr"] == f"{100 * result.scores['acc_stderr']:.1f}"
    stored(options, "mmlu").unlink()
    with pytest.raises(UserError, match="no results of a task with subjects"):
        subjects_text([options.output], "md")


def test_no_place_to_write(options: EvalOptions, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    options.output.write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write results to"):
        run_eval(options, suite)
    options.output.unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **k: mode != os.W_OK and access(path, mode, **k))
    with pytest.raises(UserError, match="no permission to write results to"):
        run_eval(options, suite)


def test_hub_rows_and_a_task_that_cannot_be_had(
    options: EvalOptions,
    suite: Suite,
    demo_questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hub answers with rows for one task, and refuses the other as it does script data sets."""
    text = (Path(str(options.data_dir)) / "sciq" / "test.jsonl").read_text(encoding="utf-8")
    questions = datasets.Dataset.from_list([json.loads(line) for line in text.splitlines()])
    rows = dict.fromkeys(("train", "validation", "test"), questions)

    real = datasets.load_dataset

    def hub(path: str, name: str | None = None, **words: Any) -> datasets.DatasetDict:
        if path == "json":
            return real(path, name, **words)
        if path == "EleutherAI/logiqa":
            raise RuntimeError("Dataset scripts are no longer supported, but found logiqa.py")
        assert path == "allenai/sciq"
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    options.data_dir, options.tasks = None, ["sciq", "logiqa"]
    assert run_eval(options, suite) == 1
    assert results.read(stored(options)).settings.rows == "hub"
    assert not stored(options, "logiqa").exists()
    shown = capsys.readouterr().out
    assert "logiqa: – (the rows of task logiqa are not available from the hub: Dataset scripts are no longer" in shown
    assert "logiqa was unavailable: the rows of task logiqa" in table_text(2, [options.output], "md")
    options.tasks = ["logiqa"]
    with pytest.raises(UserError, match="none of the tasks is available"):
        run_eval(options, suite)
    options.data_dir, options.overwrite = demo_questions, True
    assert run_eval(options, suite) == 0
    assert "could not be had" not in table_text(2, [options.output], "md")
    assert results.find([options.output]).missing == []


def test_other_harness_version_is_refused(options: EvalOptions, suite: Suite) -> None:
    other = type(suite)(suite.tasks, lm_eval="0.4.2", seed=suite.seed)
    with pytest.raises(UserError, match=r"eval/tasks\.yaml is written for 0\.4\.2"):
        run_eval(options, other)


@pytest.mark.parametrize("setting", ["dense", "x2"])
def test_native_checkpoint(setting: str, suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    plan = small_plan(setting, max_seq_len=96)
    torch.manual_seed(0)
    path = save_native(tmp_path / "run", plan, Transformer(plan))
    link = path.with_name("latest-rank0.pt")
    link.symlink_to(path.name)
    options = EvalOptions(link, tmp_path / "out", ["sciq", "boolq"], demo_questions, device="cpu")
    assert run_eval(options, suite) == 0
    result = results.read(stored(options, "boolq", plan.name))
    assert result.model["checkpoint"] == str(path.resolve())
    assert (result.model["activated"], result.model["total"]) == (count(plan).activated, count(plan).total)
    assert (result.model["bos"], result.model["max_length"], result.model["run"]) == ("prepended", 96, "run")
    assert result.truncated["requests"] == 16


def test_a_run_that_is_not_at_its_end_is_marked(suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    plan = small_plan("x2", max_seq_len=96)
    torch.manual_seed(0)
    path = save_native(tmp_path / "run", plan, Transformer(plan))
    path.with_name("latest-rank0.pt").symlink_to(path.name)
    record = tmp_path / "run" / "run.json"

    def unfinished(status: str, checkpoint: Path = path) -> str | None:
        record.write_text(json.dumps({"status": status, "batch": 30}), encoding="utf-8")
        return checkpoints.load(open_checkpoint(checkpoint), device="cpu").info.get("unfinished")

    assert unfinished("finished") is None
    assert unfinished("finished", Path(shutil.copy(path, path.with_name("ep0-ba1-rank0.pt")))) == (
        "ep0-ba1-rank0.pt, not the last"
    )
    assert unfinished("interrupted") == "interrupted, batch 30"
    options = EvalOptions(path, tmp_path / "out", ["sciq"], demo_questions, device="cpu")
    assert run_eval(options, suite) == 0
    assert f"not trained to its end: {plan.name} interrupted, batch 30" in table_text(2, [options.output], "md")
    record.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json is not the record of a run"):
        checkpoints.load(open_checkpoint(path), device="cpu")


def test_checkpoints_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"without config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a checkpoint of a known kind"):
        open_checkpoint(tmp_path / "weights.npz")
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        open_checkpoint(bare)
    (bare / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="bare"):
        checkpoints.load(open_checkpoint(bare))


def test_tokenizer_must_be_there_and_fit(llama: Path, tmp_path: Path) -> None:
    location = open_checkpoint(llama)
    with pytest.raises(UserError, match="no tokenizer at"):
        checkpoints.load(location, tokenizer=tmp_path / "absent")
    plan = small_plan()  # 97 pieces
    path = save_native(tmp_path / "run", plan, Transformer(plan))
    with pytest.raises(UserError, match=r"has 600 pieces, the model 97"):
        checkpoints.load(open_checkpoint(path), tokenizer=llama)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\nb", "x" * 300])
def test_a_name_leads_no_result_out_of_the_output_folder(
    name: str, suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    """Neither one that is given, nor the one that a checkpoint brings; ``--name`` gives the latter another."""
    plan = small_plan(max_seq_len=96)
    good = save_native(tmp_path / "good", plan, Transformer(plan))
    options = EvalOptions(good, tmp_path / "results" / "out", ["sciq"], demo_questions, device="cpu", name=name)
    with pytest.raises(UserError, match=r"--name is .*(plain name|control characters|at most 200)"):
        run_eval(options, suite)
    evil = save_native(tmp_path / "evil", replace(plan, name=name), Transformer(plan))
    with pytest.raises(UserError, match=r"the model's name in .*evil.* \(--name gives it another\) is "):
        run_eval(replace(options, checkpoint=evil, name=None), suite)
    with pytest.raises(UserError, match=r"the model's name in .*evil.* is "):
        load_subject(str(evil))
    assert checkpoints.load(open_checkpoint(evil), name="mine", device="cpu").info["name"] == "mine"
    assert not list((tmp_path / "results").rglob("*.json"))


def test_a_tokenizer_that_is_not_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    """Beside a native checkpoint, by --tokenizer, and in an exported folder; the hashes of older checkpoints are known."""
    plan = small_plan()
    path = save_native(tmp_path / "run", plan, Transformer(plan))
    export(path, tmp_path / "exported")
    places = {path: tmp_path / "run" / "tokenizer", tmp_path / "exported": tmp_path / "exported"}
    other = Path(shutil.copytree(tmp_path / "run" / "tokenizer", tmp_path / "other"))
    swap_words(other)
    for checkpoint, place in places.items():
        found = open_checkpoint(checkpoint)
        assert checkpoints.load(found, device="cpu").info["tokenizer_sha256"] == found.tokenizer_sha256
        with pytest.raises(UserError, match=r"other is another tokenizer than .* was trained with .*--tokenizer"):
            checkpoints.load(found, tokenizer=other, device="cpu")
        swap_words(place)
        with pytest.raises(UserError, match=r"is another tokenizer than .* was trained with"):
            checkpoints.load(found, device="cpu")
        swap_words(place)
    content = torch.load(path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    content["state"]["callbacks"]["RunMetadata"]["tokenizer_sha256"] = tokenizer_sha256(tokenizer, version=1)
    torch.save(content, path)
    checkpoints.load(open_checkpoint(path), device="cpu")
    with pytest.raises(UserError, match="another tokenizer"):
        checkpoints.load(open_checkpoint(path), tokenizer=other, device="cpu")


def test_fingerprint_tells_weights_apart_and_not_places(
    llama: Path, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(llama, moved)
    assert open_checkpoint(moved).fingerprint == open_checkpoint(llama).fingerprint
    assert open_checkpoint(make_llama(seed=1)).fingerprint != open_checkpoint(llama).fingerprint
    large = tmp_path / "large.pt"
    large.write_bytes(bytes(6_000_000))
    before = fingerprint([large])
    with large.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert fingerprint([large]) != before


def test_llama_counts_as_the_paper_counts(llama: Path) -> None:
    info = checkpoints.load(open_checkpoint(llama), device="cpu").info
    model = AutoModelForCausalLM.from_pretrained(llama)
    d, f, v = 32, 48, model.config.vocab_size
    assert info["activated"] == 4 * d * d + 3 * d * f
    assert info["total"] == info["activated"] + 2 * v * d


def test_unknown_device() -> None:
    with pytest.raises(UserError, match="unknown device 'gpu9'"):
        checkpoints.pick_device("gpu9")
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.pick_device(f"cuda:{torch.cuda.device_count()}")


def call(script: Path, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a script as the command line does, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return int(ended.value.code or 0)  # type: ignore[arg-type]


def test_command_line(
    root: Path,
    llama: Path,
    demo_questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, tables = root / "eval" / "run_eval.py", root / "eval" / "make_tables.py"
    base = ["--checkpoint", llama, "--data-dir", demo_questions, "--output", tmp_path, "--device", "cpu"]
    assert call(run, *base, "--tasks", "sciq,piqa", "arc_easy", monkeypatch=monkeypatch) == 0
    assert {p.stem for p in (tmp_path / "tiny-llama").iterdir()} == {"sciq", "piqa", "arc_easy"}
    assert call(run, *base, "--tasks", "scic", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err.startswith("error: unknown task 'scic' (did you mean 'sciq'?)")
    assert call(run, *base, "--limit", "1", monkeypatch=monkeypatch) == 1
    assert call(run, *base, "--batch-size", "0", monkeypatch=monkeypatch) == 2
    assert call(run, "--tasks", "sciq", monkeypatch=monkeypatch) == 2
    assert call(tables, tmp_path, "--output", tmp_path / "t.md", monkeypatch=monkeypatch) == 0
    assert "**tiny-llama**" in (tmp_path / "t.md").read_text(encoding="utf-8")
    assert call(tables, tmp_path / "absent", monkeypatch=monkeypatch) == 1
    assert call(tables, monkeypatch=monkeypatch) == 2


def test_results_on_object_storage(
    options: EvalOptions, suite: Suite, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored as they are done, reused on another machine, read by the tables; one that can't be stored is kept here and named."""
    local = replace(options)
    run_eval(local, suite)
    options.output = f"s3://{BUCKET}/eval"
    run_eval(options, suite)
    assert f"results: s3://{BUCKET}/eval/tiny-llama" in capsys.readouterr().out
    kept = s3.client().list_objects_v2(Bucket=BUCKET)["Contents"]
    assert [entry["Key"] for entry in kept] == ["eval/tiny-llama/boolq.json", "eval/tiny-llama/sciq.json"]
    run_eval(options, suite)
    assert capsys.readouterr().out.count("reused") == 2
    assert s3.client().list_objects_v2(Bucket=BUCKET)["Contents"] == kept
    assert table_text(2, [options.output], "csv") == table_text(2, [local.output], "csv")
    with pytest.raises(UserError, match=r"the sweep is s3://.*aws s3 sync"):
        table_text(4, [options.output], "md")

    s3.fail = lambda environ: "403 AccessDenied" if environ["REQUEST_METHOD"] == "PUT" else None
    options.tasks = ["arc_easy"]
    with pytest.raises(
        UserError, match=r"uploading .*arc_easy.json failed .*AccessDenied.*the result is complete in (\S+),"
    ) as caught:
        run_eval(options, suite)
    path = Path(re.search(r"complete in (\S+),", str(caught.value))[1])
    assert results.read(path).settings.task == "arc_easy"
    shutil.rmtree(path.parent.parent)


def test_a_reason_on_object_storage_ends_with_the_result(options: EvalOptions, suite: Suite) -> None:
    """There it can't be removed."""
    run_eval(options, suite)
    folder = stored(options).parent
    content = stored(options).read_bytes()
    stored(options).unlink()
    info = results.read(stored(options, "boolq")).model
    assert results.write_missing(folder, "sciq", info, "no network") == results.missing_path(folder, "sciq")
    assert [one.task for one in results.find([options.output]).missing] == ["sciq"]
    stored(options).write_bytes(content)
    assert results.find([options.output]).missing == []
