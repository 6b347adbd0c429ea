"""Bytes of the validation text, counted from the stored tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mohd_train.data.manifest import load_manifest
from mohd_train.data.prepare import Request, prepare
from mohd_train.demo.tokenizer import train_tokenizer
from mohd_train.errors import UserError
from mohd_train.study.validation_bytes import bytes_per_token, nats_per_byte

TEXTS = {"cc": "the cat saw the dog  near the river\n\tand 123 ", "wiki": "ein Fluß ist Wasser, 川は水です 🌊 "}


def test_bytes_of_the_validation_text(tmp_path: Path) -> None:
    """Given validation documents that fill samples exactly but for a tail: decoding gives their very bytes back."""
    raw = tmp_path / "raw"
    raw.mkdir()
    written: dict[str, list[str]] = {}
    for domain, text in TEXTS.items():
        for split in ("", ".val"):
            rows = [f"{split or 1}{i} {text * (3 + i % 5)}" for i in range(60)]
            written[f"{domain}{split}"] = rows
            lines = [json.dumps({"text": row, "meta": {}}) for row in rows]
            (raw / f"{domain}{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = tmp_path / "t.model"
    train_tokenizer((row for rows in written.values() for row in rows), model, vocab_size=340)
    prepare(Request(str(raw), str(tmp_path / "out"), str(model), seq_len=16, workers=1, show_progress=False))
    manifest = load_manifest(tmp_path / "out")
    found = bytes_per_token(tmp_path / "out")
    assert found.keys() == TEXTS.keys()
    for domain, ratio in found.items():
        split = manifest.domains[domain]["val"]
        text = sum(len(row.encode()) for row in written[f"{domain}.val"])
        assert split.documents == 60
        counted = ratio * split.tokens
        assert (
            text - 16 * 8 < counted <= text + 3
        )  # without the tail of under a sample; a character cut in two counts as one
        assert counted > 0.95 * text


def test_nats_per_byte_weighs_bytes() -> None:
    domains = {"cc": (100, 300.0), "wiki": (50, 100.0)}
    assert nats_per_byte(domains, {"cc": 2.0, "wiki": 4.0}) == pytest.approx(400 / (200 + 200))
    assert math.exp(nats_per_byte({"cc": (10, 10 * math.log(256))}, {"cc": 1.0})) == pytest.approx(256)


def test_no_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        bytes_per_token(tmp_path / "none")
