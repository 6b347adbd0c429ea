"""Raw rows: exact units, exact line numbers, and no bytes that crash the reader."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.data import rows
from mohd_train.data.domains import Source
from mohd_train.data.rows import count_units, parse_row, parse_rows, range_lines, unpacked_units
from mohd_train.errors import UserError


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
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="line longer than 100 bytes"):
        list(range_lines(path, 0, 1000))
