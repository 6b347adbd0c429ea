"""`eval/observe.py` from end to end: files, refusals, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.analysis import hf_folder, llama, native, text_folder

from mohd_train import checkpoint
from mohd_train.analysis.options import KnockoutOptions, parse
from mohd_train.analysis.run import run_observation
from mohd_train.analysis.subject import fingerprint, load_subject, probed
from mohd_train.errors import UserError


def observe(*arguments: object, **kwargs) -> tuple[Path, str]:
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    folder = run_observation(parse(None, [str(a) for a in arguments]), torch.device("cpu"), console=console, **kwargs)
    return folder, console.export_text()


def test_a_mohd_checkpoint_gives_record_router_knockout_and_figures(tmp_path: Path) -> None:
    model, text = native(tmp_path / "run", spread=0.3), text_folder(tmp_path / "text")
    arguments = ("--model", model, "--data", text, "--seq-len", 32, "--tokens", 128, "--output", tmp_path / "out")
    knock = ("--knockout", "--knockout-tokens", 64, "--knockout-layers", "1", "--interventions", "removed,forced")

    def make_score(subject):
        return lambda: {"sciq": 0.5}

    folder, shown = observe(*arguments, *knock, make_score=make_score)
    record = json.loads((folder / "observation.json").read_text())
    assert record["format"] == "mohd_train.observation/2"
    assert record["model"]["plan"]["name"] == "small-x2"
    assert record["data"]["seq_len"] == 32
    assert record["options"]["shares"] == [0.2, 0.8]
    assert {"active", "sparsity"} <= set(record["definitions"])
    assert torch.__version__.startswith(record["versions"]["torch"])
    router = json.loads((folder / "router.json").read_text())
    assert len(router["selections"]) == 4  # two layers, two components
    effects = json.loads((folder / "knockout.json").read_text())
    assert {row["layer"] for row in effects["effects"]} == {1}
    assert {row["kind"] for row in effects["effects"]} == {"removed", "forced"}
    assert effects["effects"][0]["tasks"] == {"sciq": {"acc": 0.5, "delta": 0.0}}
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.pdf")}
    assert {"fig4_activation_flow", "fig5_activation_map", "fig11_router_ffn_layer1", "knockout_against_share"} <= names
    assert not list(folder.glob(".*"))  # nothing half-written is left
    for word in ("magnitude held by the top", "Spearman", "knockout.json", "fig5_activation_map.pdf"):
        assert word in shown
    assert record["magnitude"] == "square"
    assert record["hardware"]["cpu_count"] > 0
    for word in ("Gaussian noise", "71.96 (1000 of 4096)", "that of a Gaussian"):
        assert word in " ".join(shown.split())
    other = hf_folder(llama(), tmp_path / "llama")
    with pytest.raises(UserError, match="holds the observation of another model"):
        observe("--model", other, "--data", text, "--output", folder)
    with pytest.raises(UserError, match=r"--knockout: .* has no sub-dimensions"):
        observe("--model", other, "--data", text, "--output", tmp_path / "llama-out", "--knockout")


def test_another_study_of_the_same_model_is_not_written_over_the_first(tmp_path: Path) -> None:
    model, text = native(tmp_path / "run"), text_folder(tmp_path / "text")
    same = ("--model", model, "--data", text, "--seq-len", 32, "--output", tmp_path / "out")
    folder, _ = observe(*same, "--tokens", 64)
    before = (folder / "observation.json").read_text()
    for other, difference in (
        (("--tokens", 128), "tokens: 64 there, 128 now"),
        (("--tokens", 64, "--magnitude", "absolute"), "magnitude: square there, absolute now"),
        (("--tokens", 64, "--epsilon", "0.1"), "epsilon: 0.01 there, 0.1 now"),
        (("--tokens", 64, "--active", "0.5"), r"shares: \[0.2, 0.8\] there, \[0.5\] now"),
        (("--tokens", 64, "--seq-len", 16), "seq_len: 32 there, 16 now"),
        (("--tokens", 64, "--dtype", "bfloat16"), "another model|dtype: float32 there, bfloat16 now"),
        (("--tokens", 64, "--data", text / "wiki.jsonl"), "files: .* there, .* now"),
    ):
        with pytest.raises(UserError, match=f"(was made with other settings|holds).*({difference}).*--overwrite"):
            observe(*same, *other)
    assert (folder / "observation.json").read_text() == before
    knock = ("--tokens", 64, "--knockout", "--knockout-layers", 0, "--interventions", "removed", "--knockout-tokens")
    observe(
        *same, *knock, 64, "--batch-size", 1
    )  # the same measurement may be taken again, interventions be added to it
    with pytest.raises(UserError, match=r"knockout.json was made with other settings \(tokens: 64 there, 128 now\)"):
        observe(*same, *knock, 128)
    observe(*same, "--tokens", 128, "--overwrite")
    assert json.loads((folder / "observation.json").read_text())["options"]["tokens"] == 128


def test_records_of_another_format_are_not_compared(tmp_path: Path) -> None:
    """Magnitudes were |x| in format 1: such a record is named, and stays."""
    model, text = native(tmp_path / "run"), text_folder(tmp_path / "text")
    same = ("--model", model, "--data", text, "--seq-len", 32, "--tokens", 64, "--output", tmp_path / "out")
    folder, _ = observe(*same)
    record = json.loads((folder / "observation.json").read_text())
    record["format"] = "mohd_train.observation/1"
    for added in ("magnitude", "epsilon"):
        del record["options"][added]
    (folder / "observation.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"other settings \(format: mohd_train.observation/1 there"):
        observe(*same)
    (folder / "observation.json").write_text("[]")
    with pytest.raises(UserError, match="not an observation of this program"):
        observe(*same)


def test_one_changed_weight_makes_another_model(tmp_path: Path) -> None:
    """Between those that the fingerprint used to sample. Records with such a fingerprint are still recognized."""
    model, text = native(tmp_path / "run"), text_folder(tmp_path / "text")
    same = ("--model", model, "--data", text, "--seq-len", 32, "--tokens", 64, "--output", tmp_path / "out")
    folder, _ = observe(*same)
    record = json.loads((folder / "observation.json").read_text())
    assert record["model"]["fingerprint"] == checkpoint.open(model).fingerprint
    state = torch.load(model, weights_only=False)
    name, weight = next((n, w) for n, w in state["state"]["model"].items() if w.numel() > 512)
    place = next(i for i in range(weight.numel()) if i not in probed(weight.numel()))
    before = fingerprint(load_subject(str(model)).model)
    weight.view(-1)[place] += 1
    torch.save(state, model)
    assert fingerprint(load_subject(str(model)).model) == before, name
    with pytest.raises(UserError, match="holds the observation of another model"):
        observe(*same)
    record["model"]["fingerprint"] = before
    (folder / "observation.json").write_text(json.dumps(record))
    observe(*same)
    record["model"]["fingerprint"] = "0" * 16
    (folder / "observation.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="holds the observation of another model"):
        observe(*same)


def test_options_are_read() -> None:
    found = parse(
        None, ["--model", "m", "--data", "d", "--active", "0.1,0.5", "--knockout", "--knockout-layers", "0,3"]
    )
    assert found.study.shares == (0.1, 0.5)
    assert found.knockout == KnockoutOptions(layers=(0, 3))
    assert parse(None, ["--model", "m", "--data", "d"]).knockout is None


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tokens", "0"],
        ["--knockout-layers", "1"],
        ["--tasks", "sciq"],
        ["--knockout", "--limit", "5"],
        ["--active", "much"],
        ["--dtype", "int8"],
        ["--magnitude", "cube"],
        ["--epsilon", "0"],
    ],
)
def test_usage_errors_exit_with_two(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(None, ["--model", "m", "--data", "d", *wrong])
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_script_names_bad_input_in_one_line(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "eval" / "observe.py"), "--model", str(tmp_path / "x.pt"), "--data", "d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "no such checkpoint" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_tasks_are_scored_by_the_evaluation(root: Path, tmp_path: Path) -> None:
    from mohd_train.cli import observe as script

    arguments = ["--model", str(native(tmp_path / "run")), "--data", "d", "--knockout", "--limit", "4"]
    options = parse(None, [*arguments, "--tasks", "sciq", "--task-data", str(root / "eval" / "demo_questions")])
    score = script._task_score(load_subject(options.model), options, str(tmp_path / "cache"))
    found = score()
    assert set(found) == {"sciq"}
    assert found["sciq"] in (0, 0.25, 0.5, 0.75, 1)
    assert score() == found
