"""Small raw corpora and a small LLaMA-like sentencepiece model, made in a moment; and a slow, plain preparation to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
from streaming.base.compression import decompress
from streaming.base.format.mds.reader import MDSReader

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "as",
    "with",
    "by",
    "at",
    "from",
    "his",
    "which",
    "be",
    "or",
]


def make_texts(count: int, seed: int, longest: int = 60) -> list[str]:
    """Random sentences, each different, some with characters beyond ASCII."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        words = rng.choice(WORDS, int(rng.integers(1, longest)))
        texts.append(f"{seed}-{i} " + " ".join(words) + rng.choice(["", ".", "\n", " naïve 日本 🙂", "  two  spaces"]))
    return texts


def write_rows(path: Path, texts: Iterable[str]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts), encoding="utf-8")
    return path


def train_pieces(folder: Path, vocab_size: int = 360, **options: object) -> Path:
    """A sentencepiece BPE model with LLaMA's settings: byte fallback, no normalization, BOS 1, EOS 2."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(make_texts(500, 7)), encoding="utf-8")
    settings: dict[str, object] = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "pieces"),
        vocab_size=vocab_size,
        num_threads=1,
        minloglevel=2,
        **(settings | options),
    )
    return folder / "pieces.model"


def naive_samples(texts: Iterable[str], model: Path, seq_len: int) -> np.ndarray:
    """[samples, seq_len]: BOS + ids + EOS of each text end to end, cut; what is left over at the end falls away."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = [i for text in texts for i in [pieces.bos_id(), *pieces.encode(text), pieces.eos_id()]]
    whole = len(ids) // seq_len
    return np.array(ids[: whole * seq_len], np.int64).reshape(whole, seq_len)


def stored_samples(folder: Path) -> np.ndarray:
    """[samples, seq_len] of one split, read shard by shard without streaming's dataset; unpacks nothing beside them."""
    index = json.loads((folder / "index.json").read_bytes())
    rows = []
    for entry in index["shards"]:
        raw = folder / entry["raw_data"]["basename"]
        there = raw.exists()
        if not there:
            raw.write_bytes(decompress("zstd", (folder / entry["zip_data"]["basename"]).read_bytes()))
        reader = MDSReader.from_json(str(folder.parent), folder.name, entry)
        rows += [reader[i]["tokens"].astype(np.int64) for i in range(len(reader))]
        if not there:
            raw.unlink()
    return np.array(rows)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
