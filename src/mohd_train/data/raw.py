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
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from mohd_train.data.manifest import RESERVED_DOMAINS
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
# RedPajama-1T: which files of a folder are data (c4, for example, has validation files of its own).
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
# At the end of a name: which split it is, and which part of it. "test" is left out.
_SPLIT = r"train|val|valid|validation|test"
_NUMBER = r"\d+(?:-of-\d+)?|sample|part-?\d*"
_PART = re.compile(rf"([-_.]({_NUMBER}|{_SPLIT}))+$", re.IGNORECASE)
_SPLIT_NAME = re.compile(rf"(?:^|[-_.])({_SPLIT})([-_.]({_NUMBER}))*$", re.IGNORECASE)
MAX_NAME = 100  # characters in a domain's name, so that files named after it fit into a file system's limit
_NAMED = 20  # files that a note lists
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
    modified: int = 0  # nanoseconds, as the file system says; 0: not known

    @property
    def compression(self) -> str | None:
        """`gz`, `zst` or None."""
        suffix = self.path.suffix[1:].lower()
        return suffix if suffix in ("gz", "zst") else None

    def check_unchanged(self) -> None:
        """Raises UserError if the file isn't what it was when it was found: its size or its time of modification."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise UserError(f"{self.path} is gone; it has to stay until the preparation is done") from None
        if stat.st_size != self.bytes:
            change = f"it had {self.bytes:,} bytes and now has {stat.st_size:,}"
        elif self.modified and stat.st_mtime_ns != self.modified:
            change = "it was written to"
        else:
            return
        raise UserError(
            f"{self.path} changed while it was prepared ({change}); once the file is complete, prepare it into a new folder"
        )

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
    """The sources below `raw`, domain by domain, sorted by name. Links are followed.

    A first-level folder is a domain, as is a first-level file `<domain>.jsonl`, `<domain>_sample.jsonl`,
    `<domain>-00001.jsonl.zst`. Files named `val` or `validation` are validation data; those named `test` are left out. Every
    file that is left out is named in the notes.

    Raises UserError if the folder doesn't exist or has no data, a requested domain is missing, a link leads nowhere, or a
    domain has a reserved name.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise UserError(f"no raw data folder {raw}; --raw names the folder that holds the domains")
    scan = _Scan(raw)
    found: dict[str, list[Source]] = {}
    for entry in sorted(raw.iterdir()):
        if scan.is_folder(entry):
            files = scan.domain_files(entry)
            domain = ALIASES.get(entry.name.lower(), entry.name)
        elif scan.is_rows(entry):
            files, domain = [entry], domain_of_file(entry.name)
        else:
            continue
        for path in files:
            split = _split_of(path.relative_to(raw))
            if split == "test":
                scan.leave_out(path, "test data, by its name")
                continue
            stat = path.stat()
            source = Source(path, scan.name(path), domain, split, stat.st_size, stat.st_mtime_ns)
            found.setdefault(domain, []).append(source)
    for domain in found:
        if domain in RESERVED_DOMAINS or len(domain) > MAX_NAME:
            raise UserError(
                f"{raw}: a domain can't be called {domain!r}; rename it, or, if it is a split, move it into a folder named "
                "after its domain"
            )
    if not found:
        raise UserError(
            f"{raw} holds no rows ({', '.join('*' + s for s in SUFFIXES)}); --raw names the domains' folder"
        )
    return RawData(_selected(raw, found, domains), scan.notes() + _missing_notes(found, domains))


class _Scan:
    """A walk over the raw folder that records what it leaves out, and why."""

    def __init__(self, raw: Path) -> None:
        self._raw = raw
        self._left_out: dict[str, list[str]] = {}
        self._seen: dict[tuple[int, int], Path] = {}
        self._others: list[str] = []

    def name(self, path: Path) -> str:
        """The path below the raw folder."""
        return path.relative_to(self._raw).as_posix()

    def leave_out(self, path: Path, why: str) -> None:
        self._left_out.setdefault(why, []).append(self.name(path))

    def notes(self) -> list[str]:
        """What was left out, and files that are there twice."""
        return [f"left out, {why}: {_listed(names)}" for why, names in sorted(self._left_out.items())] + self._others

    def is_folder(self, path: Path) -> bool:
        """Whether to look into it: download tools keep caches in hidden folders."""
        return path.is_dir() and not path.name.startswith(".")

    def is_rows(self, path: Path) -> bool:
        """Whether a file holds rows. Raises UserError if it should, by its name, but can't be read."""
        if path.name.startswith("."):
            if path.name.lower().endswith(SUFFIXES):
                self.leave_out(path, "hidden")
            return False
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which doesn't exist; restore it, or remove the link"
            )
        if path.is_dir():
            return False
        if not path.name.lower().endswith(SUFFIXES):
            self.leave_out(path, f"names that don't end in {', '.join(SUFFIXES)}")
            return False
        if not path.is_file():
            raise UserError(f"{path} is not a regular file; move it out of the raw folder, or write its rows to a file")
        identity = _identity(path)
        if identity in self._seen:
            self._others.append(
                f"{self.name(self._seen[identity])} and {self.name(path)} are one file, which is read twice"
            )
        self._seen[identity] = path
        return True

    def domain_files(self, folder: Path) -> list[Path]:
        """Files of a domain's folder that hold rows, sorted, without those that RedPajama's own glob leaves out."""
        files = sorted(self._files(folder, ()))
        pattern = REDPAJAMA_GLOBS.get(folder.name)
        matching = {path for path in files if pattern and path.relative_to(folder).match(pattern)}
        if not matching:  # a folder that has RedPajama's name but not its file names
            return files
        matching |= {path for path in files if _stem(path.name).endswith(".val")}
        others = [self.name(path) for path in files if path not in matching]
        if others:
            self._others.append(
                f"{folder.name}: {len(others)} file(s) beside RedPajama's {pattern} left out: {_listed(others)}"
            )
        return sorted(matching)

    def _files(self, folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        above = (*above, _identity(folder))
        for path in sorted(folder.iterdir()):
            if self.is_rows(path):
                yield path
            elif self.is_folder(path) and _identity(path) in above:
                self.leave_out(path, "links to a folder above them")
            elif self.is_folder(path):
                yield from self._files(path, above)


def _identity(path: Path) -> tuple[int, int]:
    """Of the file or folder itself, whatever links lead to it."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _split_of(path: Path) -> str:
    """`train`, `val` or `test`, as the name of a raw file or of its folder within the domain says.

    Args:
        path: relative to the raw folder.
    """
    named = _SPLIT_NAME.search(_stem(path.name))
    found = [named[1]] if named else [part for part in reversed(path.parts[1:-1]) if re.fullmatch(_SPLIT, part, re.I)]
    split = found[0].lower() if found else "train"
    return "val" if split in ("valid", "validation") else split


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


def _stem(name: str) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
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
