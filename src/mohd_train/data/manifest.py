"""`manifest.json`: what a prepared data folder holds. It is written last, so where it stands, the data is whole.

Layout of a folder: `manifest.json`, `tokenizer/` (what AutoTokenizer loads), `<domain>/<split>/` with MDS shards and
their `index.json`, `bad_rows.jsonl`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
BAD_ROWS = "bad_rows.jsonl"
SPLITS = ("train", "val")
HASH = "xxh3_128"  # of shards: streaming checks the same one when it unpacks a shard


@dataclass(frozen=True)
class Shard:
    """One shard: the compressed file that is stored, and the raw one that streaming unpacks beside it."""

    file: str
    bytes: int
    hash: str
    raw_file: str
    raw_bytes: int
    raw_hash: str
    samples: int


@dataclass(frozen=True)
class SourceFile:
    """One raw file that went into a split; `fingerprint` is over its first and last 64 KiB."""

    file: str
    bytes: int
    documents: int
    fingerprint: str


@dataclass(frozen=True)
class Split:
    """`tokens` = samples x seq_len; the `tail_tokens` < seq_len left over at the end fill no sample and are not stored."""

    documents: int
    tokens: int
    samples: int
    tail_tokens: int = 0
    held_out: int = 0  # documents left out of train: copies of validation documents
    shards: list[Shard] = field(default_factory=list)
    sources: list[SourceFile] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizerInfo:
    """`sha256` identifies the mapping from text to ids (:func:`mohd_train.checkpoint.identity.tokenizer_sha256`)."""

    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    name: str
    files: dict[str, str] = field(default_factory=dict)  # name in tokenizer/ -> sha256


@dataclass(frozen=True)
class Manifest:
    """What :func:`load_manifest` returns; `settings` is what another preparation must equal to be the same one."""

    version: int
    tokenizer: TokenizerInfo
    seq_len: int
    dtype: str
    domains: dict[str, dict[str, Split]]
    bad_rows: int
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def sha256(self) -> str:
        """Identity of the prepared data, for the record of a run."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """The record without the lists of shards and sources."""
        domains = {
            domain: {
                name: {"documents": s.documents, "tokens": s.tokens, "samples": s.samples} for name, s in splits.items()
            }
            for domain, splits in self.domains.items()
        }
        tokenizer = {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256}
        return {"seq_len": self.seq_len, "dtype": self.dtype, "tokenizer": tokenizer, "domains": domains}

    def samples(self, domain: str, split: str) -> int:
        return self.domains[domain][split].samples


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes `folder/manifest.json` atomically."""
    write_atomic(folder / MANIFEST, (json.dumps(manifest.to_dict(), indent=1) + "\n").encode())


def load_manifest(folder: str | Path) -> Manifest:
    """Reads `folder/manifest.json`.

    Raises UserError when the folder or the manifest is missing, empty or broken, or of another version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; prepare it: python data_prep/prepare.py --raw DIR --out {folder}")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MANIFEST}: not a prepared data folder, or its preparation has not finished; "
            f"run data_prep/prepare.py --out {folder} (it resumes)"
        )
    try:
        obj = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the folder again, or prepare it again") from error
    version = obj.get("version") if isinstance(obj, dict) else None
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this program reads {VERSION}; prepare the data again")
    try:
        manifest = _from_dict(obj)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is broken ({error!r}); copy the folder again, or prepare it again") from error
    if not manifest.domains:
        raise UserError(f"{path} lists no domain: the data is empty; prepare it again")
    return manifest


def _from_dict(obj: Mapping[str, Any]) -> Manifest:
    domains = {
        domain: {name: split_from_dict(split) for name, split in splits.items()}
        for domain, splits in obj["domains"].items()
    }
    for domain, splits in domains.items():
        for name in SPLITS:
            if name not in splits:
                raise KeyError(f"domains.{domain}.{name}")
    tokenizer = TokenizerInfo(**obj["tokenizer"])
    return Manifest(**{**obj, "tokenizer": tokenizer, "domains": domains})


def split_from_dict(obj: Mapping[str, Any]) -> Split:
    """The inverse of `dataclasses.asdict`; KeyError or TypeError when `obj` is no split."""
    shards = [Shard(**shard) for shard in obj["shards"]]
    sources = [SourceFile(**source) for source in obj["sources"]]
    return Split(**{**obj, "shards": shards, "sources": sources})


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that it is either whole or not there, also after a crash of the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
