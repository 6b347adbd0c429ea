"""Which raw files belong to which domain. Layouts: RedPajama-1T, its sample set, one folder or one file a domain."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Source:
    """One raw file. `name` is its path under the raw folder; `split` is val for files given as validation."""

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
        """sha256 over the size and the first and last 64 KiB: tells files apart without reading terabytes."""
        digest = hashlib.sha256(str(self.bytes).encode())
        with open(self.path, "rb") as file:
            digest.update(file.read(_EDGE))
            if self.bytes > _EDGE:
                file.seek(max(_EDGE, self.bytes - _EDGE))
                digest.update(file.read(_EDGE))
        return digest.hexdigest()


@dataclass(frozen=True)
class RawData:
    """Sources by domain, in the order in which they are read; `notes` are worth telling the user."""

    domains: dict[str, list[Source]]
    notes: list[str]


def find_sources(raw: str | Path, domains: Iterable[str] | None = None) -> RawData:
    """The sources below `raw`, domain by domain, sorted by name.

    A first-level folder is a domain, as is a first-level file `<domain>.jsonl`, `<domain>_sample.jsonl`,
    `<domain>-00001.jsonl.zst`. `<name>.val.jsonl*` is given validation data.

    Raises UserError when there is no such folder, no data in it, or a domain asked for is not there.
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
    """Domain of a first-level file: a known name it begins with, or its own name less `-00001`, `_sample`, `.part2`."""
    stem = _stem(name).removesuffix(".val")
    for alias in sorted(ALIASES, key=len, reverse=True):
        if stem.lower() == alias or re.match(re.escape(alias) + r"[^a-z]", stem.lower()):
            return ALIASES[alias]
    return _PART.sub("", stem) or stem


def shares(domains: Iterable[str], sizes: dict[str, int]) -> dict[str, float]:
    """Proportions over `domains`, summing to 1: LLaMA-1's where known; a domain it lacks gets its share of the size."""
    names = list(domains)
    total = sum(sizes[name] for name in names)
    own = {name: sizes[name] / total for name in names if name not in LLAMA_SHARES}
    known = {name: LLAMA_SHARES[name] for name in names if name in LLAMA_SHARES}
    left, norm = 1.0 - sum(own.values()), sum(known.values())
    return own | {name: left * share / norm for name, share in known.items()}


def _folder_files(folder: Path) -> tuple[list[Path], int]:
    """Data files of a domain's folder, sorted; and how many RedPajama's own glob leaves out."""
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
