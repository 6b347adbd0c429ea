from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.native import save_native, swap_words
from support.plans import small_plan
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.hf import MoHDForCausalLM
from mohd_train.hf.convert import load_model
from mohd_train.hf.export import export
from mohd_train.model.llama import Transformer


def native(folder: Path, setting: str = "x2") -> tuple[Path, Transformer]:
    plan = small_plan(setting)
    model = Transformer(plan, seed=3)
    return save_native(folder, plan, model), model


@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_export_equals_the_checkpoint(tmp_path: Path, setting: str) -> None:
    path, model = native(tmp_path / "run", setting)
    export(path, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(again, MoHDForCausalLM)
    ids = torch.randint(97, (2, 9))
    torch.testing.assert_close(again.transformer.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():  # a matrix product's last bit may depend on where its weights lie in memory
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_model(path)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_model(tmp_path / "out")(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (again.config.bos_token_id, again.generation_config.eos_token_id) == (1, 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w6").input_ids == [5, 6]
    found = checkpoint.open(path)
    assert (found.plan, found.metadata["run_name"]) == (model.plan, "test")
    assert found.tensors().keys() == model.state_dict().keys()


def test_a_dense_model_exports_as_llama(tmp_path: Path) -> None:
    path, model = native(tmp_path / "run", "dense")
    export(path, tmp_path / "out", llama=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(again, LlamaForCausalLM)
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", ["", "<s> "])
def test_the_exported_tokenizer_appends_nothing(tmp_path: Path, before: str) -> None:
    """EOS at the end of a prompt would ask for another document; BOS in front is what the model was trained with."""
    path, _ = native(tmp_path / "run")
    folder = tmp_path / "run" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    first = [1] if before else []
    assert AutoTokenizer.from_pretrained(folder)("w5 w6").input_ids == [*first, 5, 6, 2]
    export(path, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w6").input_ids == [*first, 5, 6]


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code from a checkpoint ran",))


def test_bad_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, model = native(tmp_path / "run")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_model(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match=r"without config\.json"):
        load_model(path.parent)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cut\.pt is broken or half-written"):
        load_model(cut)
    other = tmp_path / "other.pt"
    torch.save(model.state_dict(), other)
    with pytest.raises(UserError, match=r"other\.pt is not a checkpoint of this project"):
        load_model(other)
    evil = tmp_path / "evil.pt"
    torch.save({"state": {"model": {}, "callbacks": {"RunMetadata": Evil()}}}, evil)
    with pytest.raises(UserError, match=r"evil\.pt is refused: it holds more than tensors and plain data"):
        load_model(evil)
    assert "code from a checkpoint ran" not in capfd.readouterr().out


def test_missing_and_foreign_parameters_are_named(tmp_path: Path) -> None:
    path, _ = native(tmp_path / "run")
    content = torch.load(path)
    weights = content["state"]["model"]
    weights["model.head.weights"] = weights.pop("model.head.weight")
    torch.save(content, path)
    with pytest.raises(UserError, match=r"Missing key.*head\.weight.*Unexpected key.*head\.weights"):
        load_model(path)


def test_export_replaces_nothing_and_needs_the_tokenizer(tmp_path: Path) -> None:
    path, _ = native(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        export(path, tmp_path / "full")
    with pytest.raises(UserError, match="MoHD components"):
        export(path, tmp_path / "llama", llama=True)
    (tmp_path / "run" / "tokenizer").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no tokenizer at"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path, _ = native(tmp_path / "run")
    swap_words(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match=r"run/tokenizer is another tokenizer than .*ep0-ba3-rank0.pt was trained with"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    swap_words(tmp_path / "run" / "tokenizer")
    export(path, tmp_path / "out")
    assert checkpoint.open(tmp_path / "out").tokenizer_sha256 == checkpoint.open(path).tokenizer_sha256


def test_command_line(tmp_path: Path, root: Path) -> None:
    path, _ = native(tmp_path / "run")
    command = [sys.executable, "scripts/export_hf.py", str(path), str(tmp_path / "out")]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "MoHDForCausalLM with" in run.stdout
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 1
    assert (
        run.stderr.strip().splitlines()[-1]
        == f"error: {tmp_path / 'out'} exists and is not empty; choose another folder"
    )
