"""Checks a prepared folder against its manifest: every shard by size and hash. Reads, never writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from mohd_train.data.manifest import HASH, TOKENIZER_FOLDER, Manifest, Shard, Split, load_manifest

_CHUNK = 1 << 22


def verify(
    folder: str | Path,
    domains: Iterable[str] | None = None,
    *,
    hashes: bool = True,
    threads: int | None = None,
    cache: bool = False,
) -> list[str]:
    """Problems of a prepared folder, one line each, naming the file. Empty if it is sound.

    Args:
        folder: prepared data.
        domains: only these; default: all. The copy of the tokenizer is always checked.
        hashes: read every byte; otherwise only existence and sizes are checked (seconds, whatever the size).
        cache: the folder is a cache of remote data: only its unpacked shards are checked, which are read as they are; one
            that is still packed is checked when it is unpacked, and others may be missing.
        threads: hash this many files at once (default: one per core, at most 16).
    Raises:
        UserError: the manifest is missing or broken.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    problems: list[str] = []
    work: list[tuple[Path, int, str]] = []
    for domain in sorted(manifest.domains) if domains is None else domains:
        for name, split in manifest.domains[domain].items():
            place = folder / domain / name
            problems += index_problems(place, split, manifest.dtype, manifest.seq_len)
            for shard in split.shards:
                if not cache:
                    work.append((place / shard.file, shard.bytes, shard.hash))
                raw = place / shard.raw_file
                if raw.exists():  # unpacked by an earlier run, and read as it is
                    work.append((raw, shard.raw_bytes, shard.raw_hash))
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:  # xxhash releases the GIL
        problems += [problem for problem in pool.map(lambda item: _file_problem(*item, hashes=hashes), work) if problem]
    return problems + tokenizer_problems(folder, manifest)


def _file_problem(path: Path, size: int, expected: str, *, hashes: bool) -> str | None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing"
    if found != size:
        return f"{path}: {found:,} bytes, the manifest says {size:,} (truncated or overwritten)"
    if hashes and hash_file(path) != expected:
        return f"{path}: its content differs from the manifest's hash (corrupt)"
    return None


def hash_file(path: Path) -> str:
    """xxh3_128 of a file, in hex: the hash in the manifest."""
    digest = getattr(xxhash, HASH)()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def index_problems(place: Path, split: Split, dtype: str, seq_len: int) -> list[str]:
    """What is wrong with a split's `index.json`, which streaming reads: it must match the manifest's shards and sample shape."""
    path = place / "index.json"
    try:
        index = json.loads(path.read_bytes())
        listed = [shard_from_index(entry) for entry in index["shards"]]
        found = {
            (*entry["column_names"], *entry["column_encodings"], entry["compression"]) for entry in index["shards"]
        }
        encodings = {" ".join(map(str, one)) for one in found}
    except FileNotFoundError:
        return [f"{path}: missing"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{path}: broken ({error!r})"]
    if listed != split.shards:
        return [f"{path}: lists other shards than the manifest"]
    if encodings - {f"tokens ndarray:{dtype}:{seq_len} zstd"}:
        return [f"{path}: samples are {sorted(encodings)}, the manifest says {dtype} x {seq_len}"]
    if sum(shard.samples for shard in listed) != split.samples:
        return [f"{path}: holds {sum(s.samples for s in listed)} samples, the manifest says {split.samples}"]
    return []


def shard_from_index(entry: dict) -> Shard:
    """One entry of an MDS `index.json` in the manifest's form."""
    stored, raw = entry["zip_data"], entry["raw_data"]
    return Shard(
        file=stored["basename"],
        bytes=stored["bytes"],
        hash=stored["hashes"][HASH],
        raw_file=raw["basename"],
        raw_bytes=raw["bytes"],
        raw_hash=raw["hashes"][HASH],
        samples=entry["samples"],
    )


def tokenizer_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the prepared copy of the tokenizer, which a run takes over and is evaluated with."""
    place, problems = folder / TOKENIZER_FOLDER, []
    for name, sha256 in manifest.tokenizer.files.items():
        path = place / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(f"{path}: differs from the manifest's hash (corrupt or edited)")
    return problems
