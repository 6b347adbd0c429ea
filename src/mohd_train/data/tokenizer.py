"""Tokenizers: sentencepiece models and Hugging Face ones behind one `encode`, and the saved copy that AutoTokenizer loads.

A document that spells out `</s>` is plain text: it never yields the end-of-document id.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from transformers import LlamaTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mohd_train.checkpoint.identity import tokenizer_sha256
from mohd_train.errors import UserError
from mohd_train.utils.encoding import encode_text, encode_texts, open_tokenizer
from mohd_train.utils.text import first_line

# (BOS, EOS) spellings, tried in this order for a bare tokenizer.json, which doesn't say which tokens they are.
_BOUNDARIES = [("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<bos>", "<eos>"), ("[BOS]", "[EOS]")]
_BOUNDARIES += [("<|endoftext|>", "<|endoftext|>")]
_PROBES = [
    "Hello world",
    "  two  spaces\n\n\tand a tab ",
    "naïve ﬁne Ｆ １２３ ½ …",
    "日本語 привет 🙂",
    "x = {'a': [1, 2]}  # </s>",
]
_PROBES += ["\u00a0\u2003\u200b\u202f", "e\u0301", "<s>[INST] <unk>", "1234567890" * 4, "\r\n\0\x7f"]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer ready for preparation. `hf` is what is saved; `pieces`, if there is a model file, encodes faster."""

    hf: PreTrainedTokenizerBase
    pieces: sentencepiece.SentencePieceProcessor | None
    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    sha256: str

    @property
    def dtype(self) -> str:
        """The smallest of uint16, uint32 that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, without BOS and EOS.

        Raises UserError if an id is not below `vocab_size`: the tokenizer is broken.
        """
        lists = self.pieces.encode(texts) if self.pieces is not None else encode_texts(self.hf, texts)
        arrays = [np.asarray(ids, np.uint32) for ids in lists]
        for ids in arrays:
            if len(ids) and int(ids.max()) >= self.vocab_size:
                raise UserError(
                    f"tokenizer {self.name} gives token id {ids.max()}, beyond its vocabulary of {self.vocab_size}; its files "
                    "don't belong together"
                )
        return arrays

    def save(self, folder: Path) -> dict[str, str]:
        """Writes the copy that `AutoTokenizer.from_pretrained(folder)` loads; returns sha256 by file name.

        Raises UserError if the copy loads as a different tokenizer (one with a custom class, for example).
        """
        self.hf.save_pretrained(folder)
        copy = tokenizer_sha256(open_tokenizer(folder))
        if copy != self.sha256:
            raise UserError(f"tokenizer {self.name}: its saved copy does not load as the same tokenizer ({folder})")
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def load_tokenizer(source: str) -> Tokenizer:
    """Loads a sentencepiece `.model`, a `tokenizer.json`, or a Hugging Face folder or name.

    Raises UserError if it can't be loaded, has no end-of-document token, or can't be represented exactly.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # preparation is parallel over processes
    path = Path(source)
    pieces = None
    try:
        if path.is_file() and path.suffix == ".model":
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
            hf = _from_pieces(path, pieces)
        elif path.is_file():
            hf = _from_json(path)
        else:
            hf = open_tokenizer(source)
    except UserError:
        raise
    except Exception as error:  # sentencepiece, tokenizers and the hub each have exceptions of their own
        raise UserError(f"tokenizer {source} can't be loaded: {first_line(error)}") from error
    hf.model_max_length = int(1e30)  # documents may be longer than any context: no warning, no truncation
    if hf.eos_token_id is None:
        raise UserError(
            f"tokenizer {source} has no EOS token to end documents with; give its folder, with its configuration"
        )
    hf.split_special_tokens = True
    if isinstance(hf, PreTrainedTokenizerFast):
        hf.backend_tokenizer.encode_special_tokens = True
    size = max(hf.get_vocab().values()) + 1
    return Tokenizer(hf, pieces, path.name, size, hf.bos_token_id, hf.eos_token_id, tokenizer_sha256(hf))


def _from_pieces(path: Path, pieces: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerBase:
    """A LLaMA sentencepiece model as a fast tokenizer, checked against sentencepiece's own ids."""
    if pieces.bos_id() < 0 or pieces.eos_id() < 0:
        raise UserError(f"sentencepiece model {path} lacks BOS or EOS; train it with --bos_id=1 --eos_id=2")
    texts = {
        part: pieces.id_to_piece(i) for part, i in (("bos_token", pieces.bos_id()), ("eos_token", pieces.eos_id()))
    }
    hf = LlamaTokenizerFast(
        str(path), unk_token=pieces.id_to_piece(pieces.unk_id()), legacy=True, add_prefix_space=True, **texts
    )
    hf.split_special_tokens = True
    hf.backend_tokenizer.encode_special_tokens = True
    for text in _PROBES:
        if encode_text(hf, text) != pieces.encode(text):
            raise UserError(
                f"sentencepiece model {path} can't be saved exactly in Hugging Face's LLaMA format (ids differ for {text!r}): "
                "it normalizes text or adds no leading space; give a Hugging Face tokenizer folder instead"
            )
    return hf


def _from_json(path: Path) -> PreTrainedTokenizerBase:
    """A `tokenizer.json`, with the configuration beside it if there is one, else with well-known names of BOS and EOS."""
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return open_tokenizer(path.parent)
    hf = PreTrainedTokenizerFast(tokenizer_file=str(path))
    vocab = hf.get_vocab()
    for bos, eos in _BOUNDARIES:
        if bos in vocab and eos in vocab:
            return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=bos, eos_token=eos)
    raise UserError(f"{path} does not say which tokens are BOS and EOS; give its folder, with tokenizer_config.json")
