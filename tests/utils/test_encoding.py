"""A text is encoded alone, whatever the tokenizer adds by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from data.data_support import make_texts, train_pieces
from support.tokenizers import ADDING, adding
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohd_train.data.tokenizer import load_tokenizer
from mohd_train.errors import UserError
from mohd_train.utils.encoding import added_ids, append_nothing, encode_text, encode_texts

TEXTS = ["the cat", " leading space", "naïve 日本 🙂", "", "\n", *make_texts(20, 3)]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.mark.parametrize(("kind", "bos", "eos"), ADDING)
def test_a_text_alone(kind: str, bos: bool, eos: bool, pieces: Path, tmp_path: Path) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    tokenizer = adding(kind, bos, eos, pieces, tmp_path)
    before, behind = [1] if bos else [], [2] if eos else []
    assert tokenizer("the cat")["input_ids"] == [*before, *own.encode("the cat"), *behind]  # it does add them
    assert encode_texts(tokenizer, TEXTS) == own.encode(TEXTS)
    assert [encode_text(tokenizer, text) for text in TEXTS] == own.encode(TEXTS)
    assert encode_texts(tokenizer, []) == []
    assert added_ids(tokenizer) == (before, behind)


@pytest.mark.parametrize(("kind", "bos", "eos"), ADDING)
def test_nothing_appended_is_kept_by_the_saved_copy(
    kind: str, bos: bool, eos: bool, pieces: Path, tmp_path: Path
) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    tokenizer = adding(kind, bos, eos, pieces, tmp_path / "source")
    append_nothing(tokenizer)
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    before = [1] if bos else []
    for one in (tokenizer, copy):
        assert [one(text)["input_ids"] for text in TEXTS] == [[*before, *own.encode(text)] for text in TEXTS]
        pair = one("the cat", "was")["input_ids"]
        assert pair == [*before, *own.encode("the cat"), *before, *own.encode("was")]


@pytest.mark.parametrize(("kind", "bos", "eos"), [one for one in ADDING if one[0] != "slow"])
def test_prepared_documents_have_their_own_boundaries_alone(
    kind: str, bos: bool, eos: bool, pieces: Path, tmp_path: Path
) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    adding(kind, bos, eos, pieces, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert [ids.tolist() for ids in tokenizer.encode(TEXTS)] == own.encode(TEXTS)
    assert tokenizer.sha256 == load_tokenizer(str(pieces)).sha256  # what is added is no part of the mapping


class Other(PreTrainedTokenizerFast):
    """Encodes a text in another way where special tokens are added."""

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> Any:
        return {"input_ids": [3, 3] if add_special_tokens else [[4]]}


def test_a_text_that_special_tokens_change_is_refused() -> None:
    tokenizer = Other(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>")), name_or_path="odd")
    with pytest.raises(UserError, match="the tokenizer odd doesn't encode a text the same way"):
        added_ids(tokenizer)
