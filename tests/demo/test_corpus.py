"""The corpus and the tokenizer that the demo makes of the Python installation's own text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mohd_train.demo import corpus
from mohd_train.demo.commands import _texts, tokenizer
from mohd_train.demo.tokenizer import load_tokenizer, train_tokenizer
from mohd_train.errors import UserError

SMALL = 200_000  # bytes a domain


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    corpus.build_corpus(folder, domain_bytes=SMALL)
    return folder


def rows(raw: Path, domain: str) -> list[dict]:
    return [json.loads(line) for line in (raw / domain / f"{domain}.jsonl").read_text("utf-8").splitlines()]


def test_rows_are_redpajama_s(raw: Path) -> None:
    for domain in ("code", "manual", "readme"):
        found = rows(raw, domain)
        assert len(found) > 5
        assert all(set(row) == {"text", "meta", "red_pajama_subset"} for row in found)
        assert {row["red_pajama_subset"] for row in found} == {domain}
        sizes = [len(row["text"].encode()) for row in found]
        assert sum(sizes) <= SMALL
        assert min(sizes) >= corpus.SMALLEST_DOCUMENT
        assert len({row["text"] for row in found}) == len(found)


def test_the_same_installation_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    assert corpus.build_corpus(tmp_path, domain_bytes=SMALL) == corpus.read_corpus(raw)
    for path in raw.rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / path.relative_to(raw)).read_bytes()


@pytest.mark.parametrize("damage", ["index", "file", "cut", "flip"])
def test_a_damaged_corpus_is_not_taken_for_whole(raw: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(raw, tmp_path, dirs_exist_ok=True)
    assert corpus.read_corpus(tmp_path) is not None
    file, index = tmp_path / "code" / "code.jsonl", tmp_path / corpus.INDEX
    if damage == "index":
        index.write_text(index.read_text()[:20])
    elif damage == "file":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert corpus.read_corpus(tmp_path) is None


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="has no text for the domain 'code'"):
        corpus.build_corpus(tmp_path / "raw")


def test_texts_take_the_domains_in_turn(raw: Path) -> None:
    first = [next(iter(rows(raw, domain)))["text"] for domain in ("code", "manual", "readme")]
    texts = _texts(raw)
    assert [next(texts) for _ in range(3)] == first


def test_tokenizer_round_trip(raw: Path, tmp_path: Path) -> None:
    pieces = train_tokenizer(_texts(raw), tmp_path / "a.model", vocab_size=1000)
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.get_piece_size()) == (0, 1, 2, 1000)
    samples = ["def f(x):\n\treturn  x  # two  spaces\n", "naïve ½ 日本語 🙂", " leading", "1234", "a\r\nb\u00a0c\0"]
    for text in [*samples, *(row["text"] for row in rows(raw, "manual")[:5])]:
        ids = pieces.encode(text)
        assert pieces.decode(ids) == text
        assert 0 not in ids  # byte fallback leaves nothing unknown
    train_tokenizer(_texts(raw), tmp_path / "b.model", vocab_size=1000)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_tokenizer_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give more text"):
        train_tokenizer(iter(["too little"]), tmp_path / "x.model", vocab_size=1000)
    assert not (tmp_path / "x.model").exists()
    (tmp_path / "y.model").write_bytes(b"half a model")
    for name in ("x.model", "y.model"):
        with pytest.raises(UserError, match="no sentencepiece model"):
            load_tokenizer(tmp_path / name)


def test_another_tokenizer_is_not_overwritten(raw: Path, tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    train_tokenizer(_texts(raw), model, vocab_size=1000)
    train_tokenizer(_texts(raw), model, vocab_size=1000)  # the same one, as when a demo resumes
    before = model.read_bytes()
    with pytest.raises(UserError, match=r"tokenizer\.model exists, and is not the tokenizer that this text gives"):
        train_tokenizer(_texts(raw), model, vocab_size=900)
    assert model.read_bytes() == before


def test_the_tokenizer_s_size_is_an_option(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer(raw, tmp_path / "small.model", 1024)
    assert load_tokenizer(tmp_path / "small.model").get_piece_size() == 1024
    assert "1024 pieces" in capsys.readouterr().out
