"""Code in a Hugging Face folder is not run, and nobody is asked about it, unless the user says so."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.native import save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mohd_train import checkpoint
from mohd_train.analysis.subject import load_subject
from mohd_train.checkpoint.identity import read_tokenizer
from mohd_train.data.tokenizer import load_tokenizer
from mohd_train.errors import UserError
from mohd_train.evaluate import load as evaluated
from mohd_train.hf.convert import load_model

MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
open({mark!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
open({mark!r}, "w").close()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a tokenizer whose code leaves a mark; whoever asks on standard input is told yes."""
    place = tmp_path / "model"
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **small)).save_pretrained(place)
    save_tokenizer(place, 64)
    mark = str(tmp_path / "mark")
    (place / "own.py").write_text(MODEL.format(mark=mark))
    (place / "own_tokenizer.py").write_text(TOKENIZER.format(mark=mark))
    config = json.loads((place / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (place / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto})
    )
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda *_: "yes")
    return place


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_tokenizer(str(folder)),
        lambda folder: read_tokenizer(folder, "remedy"),
        load_model,
        lambda folder: load_subject(str(folder)),
        lambda folder: evaluated.load(checkpoint.open(folder), device="cpu"),
    ],
    ids=["prepare", "tokenizer", "export", "observe", "evaluate"],
)
def test_code_of_a_folder_is_not_run(read: Callable[[Any], Any], folder: Path) -> None:
    with pytest.raises(UserError, match=r"has its own Python code.*--trust-remote-code"):
        read(folder)
    assert not (folder.parent / "mark").exists()


def test_code_of_a_trusted_folder_is_run(folder: Path) -> None:
    subject = load_subject(str(folder), trust_remote_code=True)
    assert type(subject.model).__name__ == "OwnModel"
    (folder.parent / "mark").unlink()
    loaded = evaluated.load(checkpoint.open(folder), device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"
