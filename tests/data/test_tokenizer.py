"""Tokenizers: sentencepiece's own ids, one hash for source and copy, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data.data_support import make_texts, train_pieces
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from mohd_train.data.tokenizer import load_tokenizer, tokenizer_sha256
from mohd_train.errors import UserError

HARD = [
    "</s> is not the end <s>",
    "  lead",
    "trail  ",
    "\t\n",
    "日本語🙂",
    "a\u00a0b",
    "1234567890",
    "x" * 5000,
    "e\u0301",
    "\0",
]


def words_json(path: Path, words: list[str]) -> Path:
    tokenizer = RustTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_ids_are_sentencepieces_own_before_and_after_saving(pieces: Path, tmp_path: Path) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    source = load_tokenizer(str(pieces))
    source.save(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    texts = HARD + make_texts(50, 3)
    for tokenizer in (source, copy, load_tokenizer(str(tmp_path / "copy" / "tokenizer.json"))):
        assert [ids.tolist() for ids in tokenizer.encode(texts)] == own.encode(texts)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 360)
        assert tokenizer.sha256 == source.sha256
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path / "copy")) == source.sha256
    assert not any(2 in ids for ids in own.encode(texts))


def test_another_model_has_another_hash(pieces: Path, tmp_path: Path) -> None:
    other = train_pieces(tmp_path, vocab_size=361)
    assert load_tokenizer(str(other)).sha256 != load_tokenizer(str(pieces)).sha256


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>"]
    small = load_tokenizer(str(words_json(tmp_path / "a.json", words + [f"w{i}" for i in range(65_533)])))
    large = load_tokenizer(str(words_json(tmp_path / "b.json", words + [f"w{i}" for i in range(65_534)])))
    assert (small.vocab_size, small.dtype) == (65_536, "uint16")
    assert (large.vocab_size, large.dtype) == (65_537, "uint32")
    assert large.encode(["w65533"])[0].tolist() == [65_536]
    assert large.encode([""])[0].dtype == np.uint32


@pytest.mark.parametrize("options", [{"normalization_rule_name": "nmt_nfkc"}, {"add_dummy_prefix": False}])
def test_a_model_that_cannot_be_saved_exactly_is_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(UserError, match="can't be saved exactly"):
        load_tokenizer(str(train_pieces(tmp_path, **options)))


def test_bad_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "bad.json").write_text("{}")
    for source in ("bad.model", "bad.json", "."):
        with pytest.raises(UserError, match="can't be loaded"):
            load_tokenizer(str(tmp_path / source))
    with pytest.raises(UserError, match="does not say which tokens are BOS and EOS"):
        load_tokenizer(str(words_json(tmp_path / "no_boundaries.json", ["<unk>", "a"])))


def test_no_bos_means_none(tmp_path: Path) -> None:
    words_json(tmp_path / "tokenizer.json", ["<unk>", "<end>", "a"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


@pytest.mark.real_data
def test_llamas_ids(real_data: Path, tmp_path: Path) -> None:
    model = real_data / "llama_tokenizer.model"
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    source = load_tokenizer(str(model))
    source.save(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    texts = list(HARD)
    for path in sorted((real_data / "redpajama_sample").glob("*/*.jsonl")):
        with open(path, encoding="utf-8") as file:
            texts += [json.loads(file.readline())["text"][:20_000] for _ in range(2)]
    expected = own.encode(texts)
    assert [ids.tolist() for ids in source.encode(texts)] == expected
    assert [ids.tolist() for ids in copy.encode(texts)] == expected
    assert (source.vocab_size, source.bos_id, source.eos_id, source.dtype) == (32_000, 1, 2, "uint16")
