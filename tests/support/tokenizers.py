"""The same pieces as tokenizers that add BOS, EOS, both or nothing, of each kind that Hugging Face loads."""

from __future__ import annotations

import itertools
from pathlib import Path

import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerBase

KINDS = ("slow", "template", "sequence", "roberta", "folder")
ADDING = [
    (kind, bos, eos)
    for kind, bos, eos in itertools.product(KINDS, (False, True), (False, True))
    if kind != "roberta" or (bos and eos)  # it knows nothing else
]


def _template(bos: bool, eos: bool) -> processors.TemplateProcessing:
    before, behind = ["<s>"] if bos else [], ["</s>"] if eos else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{token}:1" for token in before), "$B:1", *behind],
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )


def _fast(pieces: Path, **adds: bool) -> LlamaTokenizerFast:
    return LlamaTokenizerFast(str(pieces), legacy=True, add_prefix_space=True, **adds)


def adding(kind: str, bos: bool, eos: bool, pieces: Path, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with the ids of the sentencepiece model ``pieces`` (BOS 1, EOS 2); all but the slow one lie in ``folder``."""
    if kind == "slow":
        return LlamaTokenizer(str(pieces), add_bos_token=bos, add_eos_token=eos)
    if kind == "folder":  # tokenizer_config.json alone says it
        _fast(pieces, add_bos_token=bos, add_eos_token=eos).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = tokenizers.Tokenizer.from_str(_fast(pieces).backend_tokenizer.to_str())
    offsets = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = {
        "template": lambda: _template(bos, eos),
        "sequence": lambda: processors.Sequence([offsets, _template(bos, eos)]),
        "roberta": lambda: processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=False),
    }[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8"
    )
    return AutoTokenizer.from_pretrained(folder)
