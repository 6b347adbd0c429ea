"""A native checkpoint and its run folder, as the trainer leaves them, without a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed import checkpoint as dcp
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohd_train.checkpoint.identity import tokenizer_sha256
from mohd_train.config.plan import ModelPlan
from mohd_train.model.llama import Transformer


def save_tokenizer(folder: Path, vocab_size: int = 97) -> None:
    """A word-level tokenizer of ``vocab_size`` words with BOS 1 and EOS 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def swap_words(folder: Path) -> None:
    """Edits a saved tokenizer: two words change places, and nothing else."""
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    for old, new in (('"w5"', '"w?"'), ('"w6"', '"w5"'), ('"w?"', '"w6"')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def save_native(run_folder: Path, plan: ModelPlan, model: Transformer, name: str = "ep0-ba3-rank0.pt") -> Path:
    """``run_folder/checkpoints/NAME`` with the model, and ``run_folder/tokenizer``."""
    path = run_folder / "checkpoints" / name
    path.parent.mkdir(parents=True)
    torch.save({"state": _state(run_folder, plan, model), "rng": []}, path)
    return path


def save_sharded(run_folder: Path, plan: ModelPlan, model: Transformer, name: str = "ep0-ba3") -> Path:
    """The same as a folder of torch.distributed.checkpoint, in which the trainer keeps its metadata as JSON."""
    path = run_folder / "checkpoints" / name
    state = _state(run_folder, plan, model)
    state["callbacks"]["RunMetadata"] = {"json": json.dumps(state["callbacks"]["RunMetadata"])}
    dcp.save({"state": state}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


def _state(run_folder: Path, plan: ModelPlan, model: Transformer) -> dict[str, Any]:
    save_tokenizer(run_folder / "tokenizer", plan.vocab_size)
    sha256 = tokenizer_sha256(AutoTokenizer.from_pretrained(run_folder / "tokenizer"))
    metadata = {"plan": plan.to_dict(), "run_name": "test", "tokenizer_sha256": sha256, "seq_len": plan.max_seq_len}
    return {
        "model": {f"model.{key}": value for key, value in model.state_dict().items()},
        "callbacks": {"RunMetadata": metadata},
    }
