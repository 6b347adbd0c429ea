"""`manifest.json`: what a prepared data folder holds. It is written last, so a folder that has one is complete.

Layout of a folder: `manifest.json`, `tokenizer/` (what AutoTokenizer loads), `<domain>/<split>/` with MDS shards and
their `index.json`, `bad_rows.jsonl`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic
from mohd_train.utils.text import plain_name

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
BAD_ROWS = "bad_rows.jsonl"
SPLITS = ("train", "val")
# Names that a domain can't have: other files of the folder; words for a split, in raw file names and in the logs.
RESERVED_DOMAINS = (MANIFEST, TOKENIZER_FOLDER, BAD_ROWS, "train", "val", "valid", "validation", "test", "eval")
HASH = "xxh3_128"  # of shards; streaming checks the same hash when it unpacks one


@dataclass(frozen=True)
class Shard:
    """One shard: the compressed file that is stored, and the raw file that streaming unpacks beside it."""

    file: str
    bytes: int
    hash: str
    raw_file: str
    raw_bytes: int
    raw_hash: str
    samples: int


@dataclass(frozen=True)
class SourceFile:
    """One raw file that went into a split; `fingerprint` is a hash of its size and its first and last 64 KiB."""

    file: str
    bytes: int
    documents: int
    fingerprint: str


@dataclass(frozen=True)
class Split:
    """`tokens` = samples x seq_len. The `tail_tokens` < seq_len at the end don't fill a sample and are not stored."""

    documents: int
    tokens: int
    samples: int
    tail_tokens: int = 0
    held_out: int = 0  # documents left out of train because they are copies of validation documents
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
    """A prepared folder. `settings` identifies the preparation: another one with equal settings gives the same data."""

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
        """The manifest without the lists of shards and sources."""
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
    write_atomic(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=1) + "\n")


def describe(manifest: Manifest) -> str:
    """The manifest as text: tokenizer, shape, a table of domains and splits, then the notes."""
    t = manifest.tokenizer
    lines = [
        f"tokenizer {t.name} ({t.vocab_size:,} tokens, sha256 {t.sha256[:12]}), samples of {manifest.seq_len} {manifest.dtype}"
    ]
    lines.append(
        f"{'domain':<16}{'split':<7}{'documents':>12}{'tokens':>16}{'samples':>12}{'shards':>8}{'held out':>10}"
    )
    for domain, splits in sorted(manifest.domains.items()):
        for name in SPLITS:
            s = splits[name]
            lines.append(
                f"{domain:<16}{name:<7}{s.documents:>12,}{s.tokens:>16,}{s.samples:>12,}{len(s.shards):>8,}{s.held_out:>10,}"
            )
    total = {name: sum(splits[name].tokens for splits in manifest.domains.values()) for name in SPLITS}
    lines.append(
        f"total: {total['train']:,} tokens to train on, {total['val']:,} to validate, {manifest.bad_rows:,} bad rows"
    )
    return "\n".join(lines + [f"note: {note}" for note in manifest.notes])


def load_manifest(folder: str | Path) -> Manifest:
    """Reads `folder/manifest.json`.

    Raises UserError if the folder or the manifest is missing, empty or broken, has another version, or contains a name
    that would lead out of the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; prepare it: mohd prepare --raw DIR --out {folder}")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MANIFEST}: not a prepared data folder, or its preparation has not finished; "
            f"run mohd prepare --out {folder} (it resumes)"
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
    _check_names(manifest, path)
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


def _check_names(manifest: Manifest, path: Path) -> None:
    """Raises UserError for a name that leads out of its folder; a manifest may come from anywhere."""
    for name in manifest.tokenizer.files:
        plain_name(name, f"{path}: a file of the tokenizer")
    for domain, splits in manifest.domains.items():
        plain_name(domain, f"{path}: a domain")
        for split, content in splits.items():
            plain_name(split, f"{path}: a split of {domain}")
            for shard in content.shards:
                for name in (shard.file, shard.raw_file):
                    plain_name(name, f"{path}: a shard of {domain}/{split}")


def split_from_dict(obj: Mapping[str, Any]) -> Split:
    """The inverse of `dataclasses.asdict`; KeyError or TypeError when `obj` is no split."""
    shards = [Shard(**shard) for shard in obj["shards"]]
    sources = [SourceFile(**source) for source in obj["sources"]]
    return Split(**{**obj, "shards": shards, "sources": sources})
