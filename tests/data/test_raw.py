"""Raw rows: which files belong to which domain in each layout; exact units and line numbers, and no bytes that crash the reader."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.data import raw
from mohd_train.data.raw import (
    LLAMA_SHARES,
    Source,
    count_units,
    domain_of_file,
    find_sources,
    parse_row,
    parse_rows,
    range_lines,
    shares,
    unpacked_units,
)
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
    rows = find_sources(tmp_path)
    assert sorted(rows.domains) == ["arxiv", "c4-rp", "cc", "github", "stackexchange", "wiki"]
    assert [s.name for s in rows.domains["c4-rp"]] == ["c4/c4-train.00000-of-01024.jsonl"]
    assert len(rows.domains["cc"]) == 2
    assert rows.domains["cc"][0].compression == "zst"
    assert any("c4: 1 file" in note for note in rows.notes)
    assert any("book" in note and "defunct" in note and "renormalized" in note for note in rows.notes)


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
    rows = find_sources(tmp_path)
    assert {name: [s.split for s in files] for name, files in rows.domains.items()} == {
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


def source_of(path: Path) -> Source:
    return Source(path, path.name, "cc", "train", path.stat().st_size)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "invalid JSON"),
        (b'{"text": "a"} x', "invalid JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b"[1]", "not an object"),
        (b'{"txt": "a"}', "no text"),
        (b'{"text": 3}', "not a string"),
        (b'{"text": null}', "not a string"),
        (b'{"text": " \\n"}', "empty text"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "unreadable JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_bad_rows_are_named(line: bytes, problem: str) -> None:
    text, found = parse_row(line)
    assert text is None
    assert problem in str(found)


def test_good_rows() -> None:
    assert parse_row(b'{"text": "a\\u00e9", "pred_label": 1}\r\n') == ("aé", None)
    assert parse_row(b'\xef\xbb\xbf{"text": "a"}') == ("a", None)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_bytes_crash_the_reader(line: bytes) -> None:
    text, problem = parse_row(line)
    assert (text is None) != (problem is None)


@given(st.text(max_size=100))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    if text.strip():
        assert parse_row(json.dumps({"text": text}).encode()) == (text, None)


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_units_hold_every_line_once(lines: list[bytes], final_newline: bool) -> None:
    content = b"\n".join(lines) + (b"\n" if final_newline else b"")
    expected = content.split(b"\n")
    expected = [line + b"\n" for line in expected[:-1]] + ([expected[-1]] if expected[-1] else [])
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "a.jsonl", Path(folder) / "a.jsonl.zst"
        plain.write_bytes(content)
        half = len(content) // 2
        compress = zstandard.ZstdCompressor().compress
        packed.write_bytes(compress(content[:half]) + compress(content[half:]))  # two frames
        for size in (1, 3, 8, 1000):
            units = [
                list(range_lines(plain, i * size, min((i + 1) * size, len(content))))
                for i in range(count_units(source_of(plain), size))
            ]
            assert [line for unit in units for line in unit] == expected
            unpacked = list(unpacked_units(source_of(packed), size))
            assert b"".join(lines for lines, _ in unpacked) == content
            assert sum(read for _, read in unpacked) == (packed.stat().st_size if content else 0)


def test_blank_lines_count() -> None:
    found = list(parse_rows(iter([b'{"text": "a"}\n', b"\n", b"  \r\n", b"x\n"])))
    assert [(row.line, row.text) for row in found] == [(1, "a"), (4, None)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_and_corrupt_files_are_refused(tmp_path: Path, suffix: str) -> None:
    content = b"".join(b'{"text": "row %d"}\n' % (i * 7919) for i in range(20_000))
    packed = gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor().compress(content)
    for damaged in (packed[: len(packed) // 2], packed[:-3], b"garbage" + packed):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.jsonl\..* is truncated or corrupt after line"):
            list(unpacked_units(source_of(path), 1000))


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="line longer than 100 bytes"):
        list(range_lines(path, 0, 1000))
