"""A native checkpoint and its run folder, as the trainer leaves them, without a trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohd_train.checkpoint.identity import tokenizer_sha256
from mohd_train.config.plan import ModelPlan
from mohd_train.model.transformer import Transformer


def save_tokenizer(folder: Path, vocab_size: int = 97) -> None:
    """A word-level tokenizer of ``vocab_size`` words with BOS 1 and EOS 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_native(run_folder: Path, plan: ModelPlan, model: Transformer, name: str = "ep0-ba3-rank0.pt") -> Path:
    """``run_folder/checkpoints/NAME`` with the model, and ``run_folder/tokenizer``."""
    path = run_folder / "checkpoints" / name
    path.parent.mkdir(parents=True)
    save_tokenizer(run_folder / "tokenizer", plan.vocab_size)
    sha256 = tokenizer_sha256(AutoTokenizer.from_pretrained(run_folder / "tokenizer"))
    metadata = {"plan": plan.to_dict(), "run_name": "test", "tokenizer_sha256": sha256, "seq_len": plan.max_seq_len}
    state = {
        "model": {f"model.{key}": value for key, value in model.state_dict().items()},
        "callbacks": {"RunMetadata": metadata},
    }
    torch.save({"state": state, "rng": []}, path)
    return path
