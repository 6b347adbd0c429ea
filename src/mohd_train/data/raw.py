"""Raw rows: which files belong to which domain, and their bytes as documents and named bad rows.

Layouts: RedPajama-1T, its sample set, one folder or one file a domain.

A file is read in units of about `unit_bytes` of text, cut at line ends, so memory is bounded whatever the file's size, and
the cuts don't depend on the number of workers. Plain files are cut by byte ranges, which workers read themselves;
compressed files are unpacked by one reader, which hands the units out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from mohd_train.data.manifest import TOKENIZER_FOLDER
from mohd_train.errors import UserError

# Table 1 of LLaMA-1 (arXiv:2302.13971), as Sheared-LLaMA and the paper use it.
LLAMA_SHARES = {"cc": 0.67, "c4-rp": 0.15, "github": 0.045, "wiki": 0.045, "book": 0.045, "arxiv": 0.025}
LLAMA_SHARES["stackexchange"] = 0.02

ALIASES = {name: name for name in LLAMA_SHARES} | {
    "common_crawl": "cc",
    "commoncrawl": "cc",
    "c4": "c4-rp",
    "wikipedia": "wiki",
    "books": "book",
    "stack_exchange": "stackexchange",
}
# RedPajama-1T: which files of a folder are data (c4 carries validation files of its own, for one).
REDPAJAMA_GLOBS = {
    "arxiv": "arxiv*",
    "c4": "c4-train*",
    "common_crawl": "*/*",
    "github": "filtered*",
    "stackexchange": "stackexchange*",
    "wikipedia": "wiki*",
    "book": "book*",
}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_PART = re.compile(r"([-_.](\d+|sample|train|part-?\d*))+$")
_EDGE = 1 << 16

UNIT_BYTES = 16 << 20
MAX_LINE_BYTES = 1 << 30
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One raw file. `name` is its path under the raw folder; `split` is `val` for files that the user gave as validation."""

    path: Path
    name: str
    domain: str
    split: str
    bytes: int

    @property
    def compression(self) -> str | None:
        """`gz`, `zst` or None."""
        suffix = self.path.suffix[1:]
        return suffix if suffix in ("gz", "zst") else None

    def fingerprint(self) -> str:
        """sha256 of the size and the first and last 64 KiB, which tells files apart without reading terabytes."""
        digest = hashlib.sha256(str(self.bytes).encode())
        with open(self.path, "rb") as file:
            digest.update(file.read(_EDGE))
            if self.bytes > _EDGE:
                file.seek(max(_EDGE, self.bytes - _EDGE))
                digest.update(file.read(_EDGE))
        return digest.hexdigest()


@dataclass(frozen=True)
class RawData:
    """Sources by domain, in the order they are read; `notes` are shown to the user."""

    domains: dict[str, list[Source]]
    notes: list[str]


def find_sources(raw: str | Path, domains: Iterable[str] | None = None) -> RawData:
    """The sources below `raw`, domain by domain, sorted by name.

    A first-level folder is a domain, as is a first-level file `<domain>.jsonl`, `<domain>_sample.jsonl`,
    `<domain>-00001.jsonl.zst`. `<name>.val.jsonl*` is given validation data.

    Raises UserError if the folder doesn't exist or has no data, or a requested domain is missing.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise UserError(f"no raw data folder {raw}; --raw names the folder that holds the domains")
    found: dict[str, list[Source]] = {}
    notes: list[str] = []
    for entry in sorted(raw.iterdir()):
        if entry.name.startswith("."):  # caches of download tools
            continue
        if entry.is_dir():
            files, left = _folder_files(entry)
            domain = ALIASES.get(entry.name.lower(), entry.name)
            if left:
                notes.append(f"{entry.name}: {left} file(s) beside RedPajama's {REDPAJAMA_GLOBS[entry.name]} left out")
        elif _is_data(entry):
            files, domain = [entry], domain_of_file(entry.name)
        else:
            continue
        for path in files:
            split = "val" if _stem(path.name).endswith(".val") else "train"
            source = Source(path, path.relative_to(raw).as_posix(), domain, split, path.stat().st_size)
            found.setdefault(domain, []).append(source)
    if TOKENIZER_FOLDER in found:
        raise UserError(f"{raw}: a domain can't be called {TOKENIZER_FOLDER!r}, which the output needs; rename it")
    if not found:
        raise UserError(
            f"{raw} holds no rows ({', '.join('*' + s for s in SUFFIXES)}); --raw names the domains' folder"
        )
    return RawData(_selected(raw, found, domains), notes + _missing_notes(found, domains))


def domain_of_file(name: str) -> str:
    """Domain of a first-level file: the known name it begins with, else its own name without `-00001`, `_sample`, `.part2`."""
    stem = _stem(name).removesuffix(".val")
    for alias in sorted(ALIASES, key=len, reverse=True):
        if stem.lower() == alias or re.match(re.escape(alias) + r"[^a-z]", stem.lower()):
            return ALIASES[alias]
    return _PART.sub("", stem) or stem


def shares(domains: Iterable[str], sizes: dict[str, int]) -> dict[str, float]:
    """Proportions of `domains`, summing to 1: LLaMA-1's where it has the domain, else the domain's share of the size."""
    names = list(domains)
    total = sum(sizes[name] for name in names)
    own = {name: sizes[name] / total for name in names if name not in LLAMA_SHARES}
    known = {name: LLAMA_SHARES[name] for name in names if name in LLAMA_SHARES}
    left, norm = 1.0 - sum(own.values()), sum(known.values())
    return own | {name: left * share / norm for name, share in known.items()}


def _folder_files(folder: Path) -> tuple[list[Path], int]:
    """Data files of a domain's folder, sorted, and how many RedPajama's own glob leaves out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path))
    pattern = REDPAJAMA_GLOBS.get(folder.name)
    matching = [path for path in files if pattern and path.relative_to(folder).match(pattern)]
    if not matching:  # a folder that has RedPajama's name but not its file names
        return files, 0
    given = {path for path in files if _stem(path.name).endswith(".val")}
    chosen = sorted(given.union(matching))
    return chosen, len(files) - len(chosen)


def _is_data(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in path.parts[-2:])


def _stem(name: str) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _selected(raw: Path, found: dict[str, list[Source]], domains: Iterable[str] | None) -> dict[str, list[Source]]:
    wanted = sorted(found) if domains is None else sorted({ALIASES.get(name.lower(), name) for name in domains})
    for name in wanted:
        if name not in found:
            raise UserError(f"--domains: {raw} has no domain {name!r}; it has {', '.join(sorted(found))}")
        if all(source.split == "val" for source in found[name]):
            raise UserError(f"{raw}: domain {name!r} has validation files only, and no rows to train on")
    return {name: sorted(found[name], key=lambda source: source.name) for name in wanted}


def _missing_notes(found: dict[str, list[Source]], domains: Iterable[str] | None) -> list[str]:
    missing = [name for name in LLAMA_SHARES if name not in found]
    if domains is not None or not missing or len(missing) == len(LLAMA_SHARES):
        return []
    why = " (RedPajama's book is defunct on the hub)" if "book" in missing else ""
    return [
        f"of RedPajama's seven domains these are absent: {', '.join(missing)}{why}; the others' shares are renormalized"
    ]


@dataclass(frozen=True)
class Row:
    """One non-blank line. `line` counts from 1 at the start of the unit; exactly one of `text` and `problem` is set."""

    line: int
    text: str | None
    problem: str | None


def parse_row(line: bytes) -> tuple[str | None, str | None]:
    """(text, None) of a good row, (None, what is wrong) of a bad one."""
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
    """How many units a plain file has."""
    return -(-source.bytes // unit_bytes)


def range_lines(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin at bytes start..stop-1. The last one is read to its end, even beyond `stop`."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            _line(file, path)  # the rest of a line that began before, or just the newline that ends it
        while file.tell() < stop and (line := _line(file, path)):
            yield line


def unpacked_units(source: Source, unit_bytes: int = UNIT_BYTES) -> Iterator[tuple[bytes, int]]:
    """Units of a compressed file: (whole lines, at least `unit_bytes` of them, compressed bytes that they took).

    Raises UserError if the file is truncated or corrupt.
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
                f"{source.path} is truncated or corrupt after line {number:,} ({error}); download it again"
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
    """A zstd file of any number of frames as a stream. zstandard's own reader accepts a truncated file as complete."""

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
