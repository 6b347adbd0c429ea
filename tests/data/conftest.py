"""What the data tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.data_support import make_texts, train_pieces, write_rows

from mohd_train.data.manifest import Manifest
from mohd_train.data.prepare import Request, prepare

SIZES = {"cc": 300, "wiki": 120, "notes": 60}
SEQ_LEN = 32


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model."""
    return train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains, one of two files."""
    folder = tmp_path_factory.mktemp("raw")
    for seed, (domain, count) in enumerate(SIZES.items()):
        texts = make_texts(count, seed)
        write_rows(folder / domain / "a.jsonl", texts[: count // 3])
        write_rows(folder / domain / "b.jsonl", texts[count // 3 :])
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The three domains prepared; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    request = Request(str(raw), str(out), str(pieces), seq_len=SEQ_LEN, val_tokens=1500, workers=2, show_progress=False)
    return out, prepare(request).manifest
