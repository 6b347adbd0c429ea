"""What tells checkpoints and tokenizers apart: every byte of the one, everything that decides ids of the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.native import save_native, save_sharded
from support.plans import small_plan
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohd_train import checkpoint
from mohd_train.checkpoint import identity
from mohd_train.checkpoint.identity import check_tokenizer, fingerprint, is_tokenizer, tokenizer_sha256
from mohd_train.errors import UserError
from mohd_train.hf.export import export
from mohd_train.model.llama import Transformer


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("at", [0, 70_001, 3_000_000, 5_999_999])
def test_a_byte_edited_anywhere_is_another_checkpoint(tmp_path: Path, at: int) -> None:
    """64 samples of 64 KiB, as it was once, leave 70,001 and 3,000,000 unread."""
    file = tmp_path / "ep0-ba1-rank0.pt"
    file.write_bytes(os.urandom(6_000_000))
    before = fingerprint([file])
    flip(file, at)
    assert fingerprint([file]) != before
    flip(file, at)
    assert fingerprint([file]) == before


@pytest.mark.parametrize("kind", ["sharded", "hf"])
def test_every_file_of_a_folder_counts(tmp_path: Path, kind: str) -> None:
    plan = small_plan("x2")
    native = (save_sharded if kind == "sharded" else save_native)(tmp_path / "run", plan, Transformer(plan, seed=3))
    if kind == "hf":
        export(native, tmp_path / "exported")
    folder = native if kind == "sharded" else tmp_path / "exported"
    before = checkpoint.open(folder)
    known = before.fingerprint
    names = {"sharded": {".metadata", "__0_0.distcp"}, "hf": {"config.json", "model.safetensors"}}[kind]
    assert {file.name for file in before.files} == names
    for file in before.files:
        flip(file, file.stat().st_size // 2)
        assert fingerprint(before.files) != known
        flip(file, file.stat().st_size // 2)
    assert fingerprint(before.files) == known
    moved = folder.rename(tmp_path / "moved")
    assert checkpoint.open(moved).fingerprint == known


class Cache:
    """A large file, and how often it was read."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.file, self.reads = folder / "weights.safetensors", 0
        self.folder = folder / "cache" / "mohd_train" / "fingerprints"
        self.file.write_bytes(os.urandom(4096))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(identity, "CACHED_FROM", 4096)
        patch.setattr(identity, "SETTLED", 50_000_000)
        real = Path.open

        def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
            self.reads += path == self.file
            return real(path, *args, **kwargs)

        patch.setattr(Path, "open", counted)

    def hash(self, wait: float = 0.06) -> tuple[str, int]:
        """The fingerprint, and how often the file was read for it."""
        time.sleep(wait)
        before = self.reads
        return fingerprint([self.file]), self.reads - before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path, monkeypatch)


def test_a_large_file_is_read_once(cache: Cache) -> None:
    first, reads = cache.hash()
    assert reads == 1
    assert cache.hash() == (first, 0)
    assert len(list(cache.folder.iterdir())) == 1


def test_the_cache_is_not_trusted_for_a_file_that_changed(cache: Cache) -> None:
    """Its size, inode and time of modification may all be the old ones: then the time of its last change is not."""
    first, _ = cache.hash()
    stat = cache.file.stat()
    content = cache.file.read_bytes()
    cache.file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(cache.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = cache.file.stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (stat.st_size, stat.st_ino, stat.st_mtime_ns)
    second, reads = cache.hash()
    assert (second != first, reads) == (True, 1)
    other = cache.file.with_name("other")  # another file in its place: size and modification time as before
    other.write_bytes(content)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(cache.file)
    assert cache.hash() == (first, 1)


@pytest.mark.parametrize("key", ["path", "device", "inode", "size", "modified", "changed"])
def test_the_cache_is_trusted_only_where_all_agrees(cache: Cache, key: str) -> None:
    cache.hash()
    entry = next(cache.folder.iterdir())
    stored = json.loads(entry.read_text())
    entry.write_text(json.dumps(stored | {key: "other", "xxh3_128": "0" * 32}))
    assert cache.hash()[1] == 1
    entry.write_text(json.dumps({name: value for name, value in stored.items() if name != key}))
    assert cache.hash()[1] == 1


def test_a_cache_that_cannot_be_used_costs_time_alone(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = cache.hash()
    next(cache.folder.iterdir()).write_text("{")
    assert cache.hash() == (first, 1)
    (cache.file.parent / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.file.parent / "no-folder"))
    assert [cache.hash() for _ in range(2)] == [(first, 1)] * 2
    assert fingerprint([cache.file], cached=False) == first


def test_a_file_that_has_just_changed_is_not_cached(cache: Cache) -> None:
    """It may change again within a tick of the file system's clock, and look the same."""
    cache.file.write_bytes(os.urandom(4096))
    cache.hash(wait=0)
    assert not cache.folder.exists()


def words(folder: Path, **flags: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary holds ``<mark>``, an added token with these flags; saved and read again."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<mark>", "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([AddedToken("<mark>", **flags)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(folder)) == tokenizer_sha256(made)
    return made


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized", "single_word", "special"])
def test_flags_of_added_tokens_are_part_of_a_tokenizer(tmp_path: Path, flag: str) -> None:
    plain = words(tmp_path / "plain", **{flag: False})
    flagged = words(tmp_path / "flagged", **{flag: True})
    assert tokenizer_sha256(plain) != tokenizer_sha256(flagged)
    assert tokenizer_sha256(plain, version=1) == tokenizer_sha256(flagged, version=1)  # what overlooked it
    with pytest.raises(UserError, match=r"X differs \(sha256 [0-9a-f]{12}, not [0-9a-f]{12}\); mend it"):
        check_tokenizer(tokenizer_sha256(plain), flagged, what="X differs", remedy="mend it")


def test_a_flag_decides_ids(tmp_path: Path) -> None:
    ids = [words(tmp_path / str(flag), single_word=flag)("a <mark>b").input_ids for flag in (False, True)]
    assert ids == [[4, 3, 5], [4, 0]]


def test_old_hashes_are_recognized(tmp_path: Path) -> None:
    """By the way they were made; and two recorded ones of different versions by the tokenizer that lies there."""
    made, other = words(tmp_path / "a"), words(tmp_path / "b", lstrip=True)
    other_words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")), eos_token="</s>"
    )
    old, new = (tokenizer_sha256(made, version=version) for version in (1, 2))
    assert (len(old), old.isalnum(), len(new), new[:3]) == (64, True, 67, "v2:")
    assert is_tokenizer(old, made)
    assert is_tokenizer(new, made)
    assert is_tokenizer(old, other)  # all that the old hash can tell
    assert not is_tokenizer(new, other)
    assert not is_tokenizer(old, other_words)
    for expected, found in ((old, new), (new, old), (old, made), (old, old), (None, new)):
        check_tokenizer(expected, found, what="X", remedy="Y", folder=tmp_path / "a")
    with pytest.raises(UserError, match="X"):
        check_tokenizer(new, old, what="X", remedy="Y", folder=tmp_path / "b")
    with pytest.raises(UserError, match="no tokenizer at"):
        check_tokenizer(new, old, what="X", remedy="Y", folder=tmp_path / "nowhere")


def test_identities_load_neither_torch_nor_transformers() -> None:
    """Tables compare fingerprints, and open in a second."""
    heavy = "{'torch', 'transformers', 'composer'} & sys.modules.keys()"
    program = f"import sys, mohd_train.checkpoint.identity; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
