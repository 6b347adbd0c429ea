"""An exported folder as a stranger finds it: this package can't be imported where it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.native import save_native
from support.plans import SETTINGS, small_plan
from tokenizers import Tokenizer, models
from train.train_support import make_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mohd_train import checkpoint
from mohd_train.config.schema import ExpertsConfig
from mohd_train.errors import UserError
from mohd_train.hf import export as exporting
from mohd_train.hf import remote_code
from mohd_train.hf.convert import load_native
from mohd_train.hf.export import check_folders, export
from mohd_train.model.count import count
from mohd_train.model.llama import Transformer
from mohd_train.train.train import train

HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mohd_train":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""


def stranger(code: str, cache: Path, *arguments: Any) -> str:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HIDDEN + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trained(folder: Path, setting: str = "x2", **readings: Any) -> Path:
    plan = small_plan(setting, **readings)
    return save_native(folder, plan, Transformer(plan, seed=3))


CASES: list[tuple[str, dict[str, Any]]] = [
    *((setting, {}) for setting in ("dense", *SETTINGS)),
    ("x2", {"fusion": "monarch", "gate_input": True, "router_input": "residual"}),
    ("x2", {"routing": "random", "scaling": "gate_mass", "fusion": "none"}),
    ("dense", {"experts": ExpertsConfig(6, 3, 1), "fusion": "none"}),
]


def test_the_code_it_carries_computes_the_checkpoints_logits_and_choices(tmp_path: Path) -> None:
    """The check of every export, in a process of its own: every setting of Table 3 and other readings, and that it can fail."""
    exported = {}
    for number, (setting, readings) in enumerate(CASES):
        path, out = trained(tmp_path / f"run{number}", setting, **readings), tmp_path / f"out{number}"
        export(path, out, check=False)
        exported[out] = load_native(path)
    check_folders(exported)
    native = exported[tmp_path / f"out{CASES.index(('x2', {}))}"]
    assert {part.kernels for part in native.modules() if hasattr(part, "kernels")} == {"auto"}  # as before
    with torch.no_grad():
        native.transformer.head.weight[0] += 1
    with pytest.raises(UserError, match=r"logits differ by .*e-"):
        check_folders({tmp_path / f"out{CASES.index(('x2', {}))}": native})


def test_two_definitions_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote_code.FILES, "modeling_mohd", ("model/mohd.py", "model/mohd.py"))
    with pytest.raises(RuntimeError, match=r"would define ForwardContext, .* twice"):
        remote_code.assemble("modeling_mohd")


def test_its_code_needs_torch_and_transformers_alone() -> None:
    for name in remote_code.FILES:
        text = remote_code.assemble(name)
        modules = {
            line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
        }
        assert modules <= {
            "__future__",
            "collections",
            "dataclasses",
            "hashlib",
            "math",
            "typing",
            "torch",
            "transformers",
            "",
        }
        assert "mohd_train." not in "\n".join(line for line in text.splitlines() if "import" in line)


def test_a_stranger_generates_fine_tunes_and_classifies(tmp_path: Path) -> None:
    export(trained(tmp_path / "run"), tmp_path / "out", check=False)
    said = stranger(
        """
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder = sys.argv[1]
asked = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, **asked)
print(model.generate(**tokenizer("w5 w6", return_tensors="pt"), max_new_tokens=3, do_sample=False)[0].tolist())
pipe = pipeline("text-generation", folder, tokenizer=tokenizer, trust_remote_code=True, batch_size=2)
print(len(pipe(["w5 w6", "w7"], max_new_tokens=3, do_sample=False)))
ids = torch.tensor([[5, 6, 7, 8]])
model.train()(ids, labels=ids).loss.backward()
print(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **asked)(ids).logits.shape[-1])
""",
        tmp_path,
        tmp_path / "out",
    )
    lines = said.strip().splitlines()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w6", return_tensors="pt")
    assert json.loads(lines[0]) == ours.generate(**ids, max_new_tokens=3, do_sample=False)[0].tolist()
    assert lines[1:] == ["2", "3"]


def test_lm_eval_runs_it(tmp_path: Path) -> None:
    """Its command line, on one small task of rows on disk."""
    export(trained(tmp_path / "run"), tmp_path / "out", check=False)
    rows = [
        {"text": "w5 w6", "choices": ["w7", "w8"], "answer": 0},
        {"text": "w9", "choices": ["w4", "w8"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.yaml").write_text(
        f"""task: small
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
"""
    )
    arguments = f"--model hf --model_args pretrained={tmp_path / 'out'},trust_remote_code=True --tasks small"
    said = stranger(
        "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()",
        tmp_path,
        *f"{arguments} --include_path {tmp_path} --device cpu --batch_size 2".split(),
    )
    assert "|small|" in said.replace(" ", "")


def test_tokenizer_and_card(tmp_path: Path) -> None:
    path = trained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    export(path, tmp_path / "out", check=False)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.model_max_length, again.pad_token) == (64, "<unk>")
    card = (tmp_path / "out" / "README.md").read_text()
    plan = load_native(path).transformer.plan
    parameters, activated = (
        sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()),
        count(plan).activated,
    )
    for said in (
        f"{parameters:,}; a token activates {activated:,} of",
        "4 of 8 sub-dimensions a token, 3 shared",
        "trust_remote_code=True",
        "2412.05644",
        "test, 3",
    ):
        assert said in card


def test_bfloat16(tmp_path: Path) -> None:
    export(trained(tmp_path / "run"), tmp_path / "out", dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mohd_train.cli import main

    calls: list[Any] = []

    def push(folder: Path, repository: str, *, private: bool) -> str:
        calls.append((folder, repository, private))
        return "https://hub/me/x2"

    monkeypatch.setattr(exporting, "push", push)
    monkeypatch.setattr(exporting, "check_folders", lambda exported: calls.append(list(exported.values())))
    path, out = trained(tmp_path / "run"), tmp_path / "out"
    assert (
        main(["export", str(path), str(out), "--dtype", "float16", "--no-check", "--push", "me/x2", "--private"])
        is None
    )
    assert calls == [(out, "me/x2", True)]
    said = capsys.readouterr().out
    assert "https://hub/me/x2" in said
    assert "its logits are" not in said
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert main(["export", str(path), str(tmp_path / "checked")]) is None
    assert len(calls) == 2
    with pytest.raises(UserError, match="is not empty"):
        main(["export", str(path), str(out)])


def test_the_card_says_what_was_measured_and_how_it_was_trained(tmp_path: Path, data: Path) -> None:
    """From the run's record: the tokens as they were counted, the config to train it again with, and scores that are given."""
    train(make_config(tmp_path, data, "run_name=a"))
    run = tmp_path / "runs" / "a"
    metrics = run / "metrics.jsonl"  # as after a session of another batch size
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1]["tokens"] = 4321
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = checkpoint.open_native(run / "checkpoints" / "ep0-ba6-rank0.pt")
    native = load_native(found)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    text = exporting.card(found, native, tokenizer, "a", llama=False, dtype="float32", scores={"piqa, acc": "63.20%"})
    for said in (
        "4,321 tokens, seed 17",
        "| piqa, acc | 63.20% |",
        "composer -n 1 -c mohd train training_config.yaml",
        "Chen, Yilong",
    ):
        assert said in text


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append((repo_id, folder_path))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert exporting.push(tmp_path, "me/x2", private=True) == "https://hub/me/x2"
    assert calls == [("me/x2", True, True), ("me/x2", tmp_path)]

    def refuse(self: Hub, name: str, private: bool, exist_ok: bool) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(UserError, match=r"no such host.*is complete"):
        exporting.push(tmp_path, "me/x2")
