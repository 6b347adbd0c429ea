"""Small models and text for the analysis tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.native import save_native, save_tokenizer
from support.plans import small_plan
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mohd_train.analysis.subject import Subject, load_subject
from mohd_train.model.llama import Transformer

VOCABULARY = 97


def llama(**config: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            **config,
        )
    ).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def hf_folder(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY)
    return folder


def native(run: Path, setting: str = "x2", spread: float = 0.0, **mohd: Any) -> Path:
    """A random checkpoint; ``spread`` makes the router's centroids that much larger, so that it has preferences."""
    plan = small_plan(setting, **mohd)
    model = Transformer(plan, seed=3)
    if spread:
        for name, parameter in model.named_parameters():
            if name.endswith("router.centroids"):
                torch.nn.init.normal_(parameter, std=spread)
    return save_native(run, plan, model)


def text_folder(folder: Path, rows: int = 8, words: int = 60) -> Path:
    """Two domains of JSON lines, words of the test tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for domain in ("wiki", "code"):
        lines = []
        for _ in range(rows):
            ids = torch.randint(4, VOCABULARY, (words,), generator=generator).tolist()
            lines.append(json.dumps({"text": " ".join(f"w{i}" for i in ids)}))
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def subject_of(path: Path) -> Subject:
    return load_subject(str(path))
