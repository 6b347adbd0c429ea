"""Which raw files belong to which domain, in each layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from mohd_train.data.domains import LLAMA_SHARES, domain_of_file, find_sources, shares
from mohd_train.errors import UserError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')
    return folder


def found(folder: Path, domains: list[str] | None = None) -> dict[str, list[str]]:
    return {name: [s.name for s in files] for name, files in find_sources(folder, domains).domains.items()}


def test_redpajama_1t(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "arxiv/arxiv_0.jsonl",
        "c4/c4-train.00000-of-01024.jsonl",
        "c4/c4-validation.00000.jsonl",
        "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
        "common_crawl/2020-05/en_middle_0001.json.gz.dedup.classifier.jsonl.zst",
        "github/filtered_1.sampled.jsonl",
        "stackexchange/stackexchange.jsonl",
        "wikipedia/wiki.jsonl",
        "arxiv/README.md",
        ".cache/x.jsonl",
    )
    raw = find_sources(tmp_path)
    assert sorted(raw.domains) == ["arxiv", "c4-rp", "cc", "github", "stackexchange", "wiki"]
    assert [s.name for s in raw.domains["c4-rp"]] == ["c4/c4-train.00000-of-01024.jsonl"]
    assert len(raw.domains["cc"]) == 2
    assert raw.domains["cc"][0].compression == "zst"
    assert any("c4: 1 file" in note for note in raw.notes)
    assert any("book" in note and "defunct" in note and "renormalized" in note for note in raw.notes)


def test_sample_set(tmp_path: Path) -> None:
    touch(tmp_path, "arxiv_sample.jsonl", "book_sample.jsonl", "c4_sample.jsonl", "github_sample.jsonl")
    touch(
        tmp_path,
        "stackexchange_sample.jsonl",
        "wikipedia_sample.jsonl",
        "cc_2019-30_sample.jsonl",
        "cc_2023-06_sample.jsonl",
    )
    domains = found(tmp_path)
    assert sorted(domains) == sorted(LLAMA_SHARES)
    assert domains["cc"] == ["cc_2019-30_sample.jsonl", "cc_2023-06_sample.jsonl"]
    assert find_sources(tmp_path).notes == []


def test_one_file_a_domain_with_given_validation(tmp_path: Path) -> None:
    touch(
        tmp_path, "c4-rp.jsonl.zst", "c4-rp.val.jsonl.zst", "stdlib.jsonl", "docs-00000.jsonl.gz", "docs-00001.jsonl.gz"
    )
    raw = find_sources(tmp_path)
    assert {name: [s.split for s in files] for name, files in raw.domains.items()} == {
        "c4-rp": ["train", "val"],
        "docs": ["train", "train"],
        "stdlib": ["train"],
    }


def test_a_known_folder_with_other_file_names(tmp_path: Path) -> None:
    touch(tmp_path, "github/sample_github1.jsonl", "github/deep/er/x.jsonl.gz", "own domain/a.jsonl")
    assert found(tmp_path) == {
        "github": ["github/deep/er/x.jsonl.gz", "github/sample_github1.jsonl"],
        "own domain": ["own domain/a.jsonl"],
    }


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("wikipedia_sample.jsonl", "wiki"),
        ("bookmarks.jsonl", "bookmarks"),
        ("python.part2.jsonl.gz", "python"),
        ("2020.jsonl", "2020"),
        ("cc.val.jsonl.zst", "cc"),
    ],
)
def test_names_of_files(name: str, domain: str) -> None:
    assert domain_of_file(name) == domain


def test_selection_and_bad_input(tmp_path: Path) -> None:
    touch(tmp_path, "wikipedia/wiki.jsonl", "mine.jsonl", "only.val.jsonl")
    assert sorted(found(tmp_path, ["wiki", "mine"])) == ["mine", "wiki"]
    with pytest.raises(UserError, match=r"no domain 'c4-rp'; it has mine, only, wiki"):
        find_sources(tmp_path, ["c4"])
    with pytest.raises(UserError, match="validation files only"):
        find_sources(tmp_path)
    with pytest.raises(UserError, match="no raw data folder"):
        find_sources(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no rows"):
        find_sources(tmp_path / "empty")
    with pytest.raises(UserError, match="can't be called 'tokenizer'"):
        find_sources(touch(tmp_path / "t", "tokenizer.jsonl"))


def test_shares() -> None:
    assert shares(LLAMA_SHARES, dict.fromkeys(LLAMA_SHARES, 1)) == pytest.approx(LLAMA_SHARES)
    assert shares(["cc", "wiki"], {"cc": 1, "wiki": 1}) == pytest.approx({"cc": 0.67 / 0.715, "wiki": 0.045 / 0.715})
    assert shares(["a", "b"], {"a": 3, "b": 1}) == pytest.approx({"a": 0.75, "b": 0.25})
    mixed = shares(["cc", "wiki", "a"], {"cc": 50, "wiki": 30, "a": 20})
    assert mixed["a"] == pytest.approx(0.2)
    assert sum(mixed.values()) == pytest.approx(1)


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"x" * 300_000)
    before = find_sources(tmp_path).domains["a"][0].fingerprint()
    (tmp_path / "a.jsonl").write_bytes(b"x" * 299_999 + b"y")
    assert find_sources(tmp_path).domains["a"][0].fingerprint() != before
