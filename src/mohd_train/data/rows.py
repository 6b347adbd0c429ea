"""Raw rows: from bytes of JSON lines to documents, and to named bad rows. In bounded memory, whatever a file's size.

A file is read in units of about `unit_bytes` of text, cut at line ends, the same however many workers there are. Plain
files are cut by byte ranges, which workers read themselves; compressed ones are unpacked by one reader, which hands units out.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from mohd_train.data.domains import Source
from mohd_train.errors import UserError

UNIT_BYTES = 16 << 20
MAX_LINE_BYTES = 1 << 30
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One line that is not blank. `line` counts from 1 at the unit's first line; exactly one of text, problem is set."""

    line: int
    text: str | None
    problem: str | None


def parse_row(line: bytes) -> tuple[str | None, str | None]:
    """The row's (text, None), or (None, what is wrong with it)."""
    try:
        obj = json.loads(line.decode("utf-8").lstrip("\ufeff"))
    except UnicodeDecodeError as error:
        return None, f"invalid UTF-8 at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return None, f"invalid JSON: {error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
        return None, f"unreadable JSON: {error}"
    if not isinstance(obj, dict):
        return None, f"not an object but {type(obj).__name__}"
    text = obj.get("text")
    if not isinstance(text, str):
        return None, "no text" if "text" not in obj else f"text is not a string but {type(text).__name__}"
    if not text.strip():
        return None, "empty text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return None, f"text is not Unicode: lone surrogate at character {error.start}"
    return text, None


def parse_rows(lines: Iterator[bytes]) -> Iterator[Row]:
    """Rows of consecutive lines; blank lines are counted and skipped."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text, problem = parse_row(line)
            yield Row(number, text, problem)


def count_units(source: Source, unit_bytes: int = UNIT_BYTES) -> int:
    """Units of a plain file."""
    return -(-source.bytes // unit_bytes)


def range_lines(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin at a byte in start..stop-1; the last one is read to its end, beyond `stop`."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            _line(file, path)  # the rest of a line that began before, or just the newline that ends it
        while file.tell() < stop and (line := _line(file, path)):
            yield line


def unpacked_units(source: Source, unit_bytes: int = UNIT_BYTES) -> Iterator[tuple[bytes, int]]:
    """Units of a compressed file: (whole lines of at least `unit_bytes`, compressed bytes read for them).

    Raises UserError when the file is truncated or corrupt.
    """
    with open(source.path, "rb") as file:
        opened: BinaryIO = gzip.GzipFile(fileobj=file) if source.compression == "gz" else ZstdFile(file)  # type: ignore[assignment]
        lines = io.BufferedReader(opened, _BLOCK)  # type: ignore[type-var]
        unit, size, before, number = [], 0, 0, 0
        try:
            while line := _line(lines, source.path):
                unit.append(line)
                size += len(line)
                number += 1
                if size >= unit_bytes:
                    position = file.tell()
                    yield b"".join(unit), position - before
                    unit, size, before = [], 0, position
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"{source.path} is truncated or corrupt after line {number:,} ({error}); fetch it again"
            ) from error
        if unit:
            yield b"".join(unit), source.bytes - before


def _line(file: BinaryIO, path: Path) -> bytes:
    """One line with its newline; b"" at the end of the file."""
    start = file.tell() if file.seekable() else None
    line = file.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
        where = "" if start is None else f" at byte {start:,}"
        raise UserError(
            f"{path}: a line longer than {MAX_LINE_BYTES:,} bytes{where}; it must be one JSON object a line"
        )
    return line


class ZstdFile(io.RawIOBase):
    """A zstd file of any number of frames as a stream. zstandard's own reader takes a truncated file for whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._file.read(_BLOCK >> 3)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("the last zstd frame is not complete")
                    return 0
            if self._frame is None:
                self._frame = self._decoder.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
