"""Which tokens are looked at, and which data is refused."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from support.analysis import hf_folder, llama, native, subject_of, text_folder
from support.native import save_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mohd_train.analysis import corpus
from mohd_train.analysis.corpus import open_corpus
from mohd_train.analysis.subject import load_subject
from mohd_train.data.prepare import Request, prepare
from mohd_train.errors import UserError


@pytest.fixture
def subject(tmp_path: Path):
    return subject_of(hf_folder(llama(), tmp_path / "model"))


def row(*words: int) -> str:
    return json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n"


def test_documents_run_on_end_to_end_between_bos_and_eos(subject, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(row(4, 5, 6) + "\n" + row(7, 8), encoding="utf-8")
    found = open_corpus(file, subject, 3)
    assert list(found.domains) == ["some"]
    sequences = list(found.domains["some"]())
    assert np.concatenate(sequences).tolist() == [1, 4, 5, 6, 2, 1, 7, 8, 2]  # <s> is 1, </s> 2
    packed = tmp_path / "some.jsonl.zst"
    packed.write_bytes(zstandard.compress(file.read_bytes()))
    assert np.array_equal(list(open_corpus(packed, subject, 3).domains["some"]()), sequences)


def test_a_text_file_is_one_document_however_it_is_read(
    subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("w4 w5\nw6\n\nw7 w8\nw9", encoding="utf-8")
    for block in (1, 8, 1 << 20):
        monkeypatch.setattr("mohd_train.analysis.corpus._TEXT_BLOCK", block)
        tokens = np.concatenate(list(open_corpus(file, subject, 1).domains["book"]())).tolist()
        assert (tokens[:6], tokens[-2:]) == ([1, 4, 5, 6, 7, 8], [9, 2])
        assert tokens.count(2) == 1


def test_domains_get_equal_parts_and_validation_files_come_first(subject, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text")
    (folder / "wiki.val.jsonl").write_text(row(*range(4, 70)) * 3, encoding="utf-8")
    found = open_corpus(folder, subject, 16)
    batches = list(found.batches(80, 2))
    assert [(batch.domain, tuple(batch.ids_BT.shape)) for batch in batches] == [
        ("code", (2, 16)),
        ("code", (1, 16)),
        ("wiki", (2, 16)),
    ]
    assert batches[-1].ids_BT[0].tolist() == [1, *range(4, 19)]
    assert len(batches) == found.count_batches(80, 2)


def test_prepared_data_gives_its_validation_samples(tmp_path: Path) -> None:
    hf_folder(llama(), tmp_path / "model")
    request = Request(
        raw=str(text_folder(tmp_path / "text", rows=40)),
        out=str(tmp_path / "data"),
        tokenizer=str(tmp_path / "model"),
        seq_len=32,
        val_tokens=400,
        workers=1,
        show_progress=False,
    )
    manifest = prepare(request).manifest
    subject = subject_of(tmp_path / "model")
    found = open_corpus(tmp_path / "data", subject)
    assert found.seq_len == 32
    assert sorted(found.domains) == ["code", "wiki"]
    for domain, sequences in found.domains.items():
        rows = list(sequences())
        assert len(rows) == manifest.samples(domain, "val")
        assert sum(row[0] == 1 for row in rows) >= 1  # the first sample of a split begins a document
        assert np.array_equal(rows, list(sequences()))  # the same order each time
    halves = open_corpus(tmp_path / "data", subject, 16)
    first = next(iter(found.domains["code"]()))
    assert np.concatenate(list(islice(halves.domains["code"](), 2))).tolist() == first.tolist()
    with pytest.raises(UserError, match="has samples of 32 tokens"):
        open_corpus(tmp_path / "data", subject, 48)

    save_tokenizer(tmp_path / "other", 90)
    other = load_subject(str(tmp_path / "model"), tokenizer=tmp_path / "other")
    with pytest.raises(UserError, match="was made with another tokenizer"):
        open_corpus(tmp_path / "data", other)
    other_words = native(tmp_path / "run")
    assert open_corpus(tmp_path / "data", subject_of(other_words)).seq_len == 32
    content = torch.load(other_words)
    content["state"]["callbacks"]["RunMetadata"]["tokenizer_sha256"] = "0" * 64
    torch.save(content, other_words)
    with pytest.raises(UserError, match=r"run/tokenizer is another tokenizer than .* was trained with"):
        subject_of(other_words)
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match="was made with another tokenizer"):  # a checkpoint names its own
        open_corpus(tmp_path / "data", subject_of(other_words))
    (tmp_path / "data" / "code" / "val" / "index.json").unlink()
    with pytest.raises(UserError, match=r"code/val/index.json: missing"):
        open_corpus(tmp_path / "data", subject)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w4"}\n{"text": 5}\n', r"x.jsonl:2: text is not a string"),
        ('{"text": "w4"}\n{"text"\n', r"x.jsonl:2: invalid JSON"),
        ('{"text": "w4 w5"}\n', "less text than one sequence of 16 tokens"),
    ],
)
def test_bad_rows_and_too_little_text_are_named(subject, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(open_corpus(file, subject, 16).batches(64, 2))


def test_what_cannot_be_read_is_named(subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data at"):
        open_corpus(tmp_path / "none", subject)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text"):
        open_corpus(tmp_path / "empty", subject)
    with pytest.raises(UserError, match="longer than the model reads"):
        open_corpus(text_folder(tmp_path / "text"), subject, 65)
    (tmp_path / "latin.txt").write_bytes(b"w4 \xff\xfe w5\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(open_corpus(tmp_path / "latin.txt", subject, 2).batches(4, 1))
    llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="comes with no tokenizer"):
        open_corpus(tmp_path / "text", subject_of(tmp_path / "bare"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_subject(str(tmp_path / "model"), tokenizer=tmp_path / "empty")
    with pytest.raises(UserError, match="no model at"):
        load_subject(str(tmp_path / "nowhere"))


def test_a_spelled_out_eos_is_text(tmp_path: Path) -> None:
    words = {"<s>": 1, "</s>": 2, "<": 3, "/": 4, "s": 5, ">": 6}
    backend = Tokenizer(models.BPE(words, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("</s>")["input_ids"] == [2]
    assert corpus._text_only(tokenizer)("</s>")["input_ids"] == [3, 4, 5, 6]
    assert tokenizer("</s>")["input_ids"] == [2]  # the model's own stays as it was
