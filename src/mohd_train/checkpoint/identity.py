"""What distinguishes one checkpoint, and one tokenizer, from another; and the one comparison of tokenizers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mohd_train.errors import UserError
from mohd_train.utils.encoding import open_tokenizer
from mohd_train.utils.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 22  # bytes read at once
CACHED_FROM = 1 << 26  # bytes: a smaller file is hashed quickly
SETTLED = 2_000_000_000  # ns: a file that changed later than this before it was hashed may change again within its clock's tick
VERSION_2 = "v2:"  # begins the second kind of tokenizer hash; the first had no mark
ADDED_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


# Checkpoints


def fingerprint(files: Iterable[Path], *, cached: bool = True) -> str:
    """32 hex digits over every byte of the files, their sizes and (of several) their names: not over the folder they
    lie in.

    Every byte is hashed by xxh3 with 128 bits, which keeps up with a disk: it guards against mix-ups, not against
    forgery. (Results stored earlier hold 16 digits, over 64 samples of each file: edits between these went unnoticed.)

    Args:
        cached: keep each large file's hash in the user's cache, so that the next command need not read it again. It
            holds for
            that file alone: it is hashed again once its size, inode, time of modification or of change (ns) differ.
    """
    files, whole = list(files), xxhash.xxh3_128()
    for file in files:
        name = file.name if len(files) > 1 else ""  # a single file may be renamed
        whole.update(f"{name}:{file.stat().st_size}:{_file_hash(file, cached)}\n".encode())
    return whole.hexdigest()


def is_sampled(found: str) -> bool:
    """Whether a fingerprint is of the old kind, which did not cover all weights and so proves nothing."""
    return len(found) == 16


def _file_hash(file: Path, cached: bool) -> str:
    before = _state(file)
    entry = _cache_entry(file) if cached and before["size"] >= CACHED_FROM else None
    if entry is not None and (stored := _stored_hash(entry, before)) is not None:
        return stored
    digest, started = xxhash.xxh3_128(), time.time_ns()
    with file.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    unchanged = _state(file) == before and started - max(before["modified"], before["changed"]) > SETTLED
    if entry is not None and unchanged:
        _store(entry, before | {"xxh3_128": found})
    return found


def _state(file: Path) -> dict[str, Any]:
    """What changes when a file does. Its modification time can be set back, the time of its last change can't."""
    stat = file.stat()
    return {
        "path": str(file.resolve()),
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "changed": stat.st_ctime_ns,
    }


def _cache_entry(file: Path) -> Path | None:
    """One small file for each hashed file, so that concurrent commands don't overwrite each other's."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return base / "mohd_train" / "fingerprints" / f"{xxhash.xxh3_64(str(file.resolve())).hexdigest()}.json"


def _stored_hash(entry: Path, state: dict[str, Any]) -> str | None:
    try:
        stored = json.loads(entry.read_text(encoding="utf-8"))
        found = stored.pop("xxh3_128")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return found if stored == state and isinstance(found, str) else None


def _store(entry: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that can't be written costs time, nothing else
        write_json(entry, content)


# Tokenizers


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase, *, version: int = 2) -> str:
    """Identity of the mapping from text to ids, the same for a source and its saved copy.

    Over: every token with its id; BOS and EOS ids; every added token with the flags that decide where it is found in a
    text (single_word, lstrip, rstrip, normalized, special); and, for a fast tokenizer, the model (merges, scores,
    fallback), normalizer and pre-tokenizer of its ``tokenizer.json``. Not over: chat templates, padding, truncation,
    names of files, and whether BOS and EOS are added around a text, which is the caller's decision.

    Args:
        version: 2 is what is written today, ``v2:`` and 64 hex digits. 1 is what older manifests and checkpoints hold,
            64 hex digits without a mark: it leaves out the added tokens' flags. To compare with a recorded hash, use
            :func:`is_tokenizer` or :func:`check_tokenizer`, which compute the version that was recorded.
    """
    from transformers import PreTrainedTokenizerFast

    mapping: dict[str, Any] = {
        "tokens": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        mapping |= {part: backend[part] for part in ("model", "normalizer", "pre_tokenizer")}
    elif hasattr(tokenizer, "sp_model"):
        mapping["model"] = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    if version > 1:
        added = sorted(tokenizer.added_tokens_decoder.items())
        mapping["added_tokens"] = [[id, *(getattr(token, key) for key in ADDED_TOKEN)] for id, token in added]
    digest = hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()
    return f"{VERSION_2}{digest}" if version > 1 else digest


def read_tokenizer(folder: Path, remedy: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises UserError, which ends with ``remedy``, where there is none or it can't be
    read."""
    if not folder.is_dir():
        raise UserError(f"no tokenizer at {folder}; {remedy}")
    try:
        return open_tokenizer(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # tokenizers and transformers each raise exceptions of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no readable tokenizer ({type(error).__name__}: {reason}); {remedy}") from error


def is_tokenizer(recorded: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a recorded hash, of either version, is this tokenizer's."""
    return recorded == tokenizer_sha256(tokenizer, version=_version(recorded))


def check_tokenizer(
    expected: str | None, found: PreTrainedTokenizerBase | str, *, what: str, remedy: str, folder: Path | None = None
) -> None:
    """Refuses a tokenizer that is not the one that is expected: every comparison of tokenizers goes through here.

    Args:
        expected: a recorded hash, such as the checkpoint's; None where nothing was recorded, which is no reason to
            refuse.
        found: the tokenizer at hand, or the hash that is recorded for it, such as a manifest's.
        what: the message's beginning, to which the hashes are added: ``"X was made with another tokenizer than Y"``.
        remedy: what to do.
        folder: where the tokenizer lies that a recorded ``found`` is of: it is read where the two hashes are of
            different versions.

    Raises:
        UserError: another tokenizer.
    """
    if expected is None:
        return
    if isinstance(found, str) and _version(found) == _version(expected):
        same = found == expected
    else:
        if isinstance(found, str):
            assert folder is not None, "hashes of different versions are compared by the tokenizer itself"
            found = read_tokenizer(folder, remedy)
        found = tokenizer_sha256(found, version=_version(expected))
        same = found == expected
    if not same:
        raise UserError(f"{what} (sha256 {_short(found)}, not {_short(expected)}); {remedy}")


def _version(recorded: str) -> int:
    return 2 if recorded.startswith(VERSION_2) else 1


def _short(recorded: str) -> str:
    return recorded.removeprefix(VERSION_2)[:12]
