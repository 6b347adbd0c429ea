"""Manifest and verification: whatever is damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data.conftest import SIZES

from mohd_train.data.manifest import Manifest, describe, load_manifest, save_manifest
from mohd_train.data.verify import verify
from mohd_train.errors import UserError

SHARD = Path("wiki/train/shard.00000.mds.zstd")


@pytest.fixture
def copy(prepared: tuple[Path, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared[0], tmp_path / "copy", ignore=shutil.ignore_patterns("*.mds", ".lock")))


def test_sound_data(copy: Path, prepared: tuple[Path, Manifest]) -> None:
    assert verify(copy) == []
    manifest = load_manifest(copy)
    assert manifest == prepared[1]
    assert manifest.sha256() == prepared[1].sha256()
    assert all(name in describe(manifest) for name in SIZES)
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.vocab_size == 360


def test_each_damage_is_named(copy: Path) -> None:
    shard = copy / SHARD
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert [str(shard) in problem and "truncated" in problem for problem in verify(copy, hashes=False)] == [True]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    assert verify(copy, hashes=False) == []
    assert [str(shard) in problem and "corrupt" in problem for problem in verify(copy)] == [True]
    assert verify(copy, ["cc"]) == []
    shard.unlink()
    assert verify(copy) == [f"{shard}: missing"]


def test_damage_beside_the_shards_is_named(copy: Path) -> None:
    (copy / "wiki/train/shard.00000.mds").write_bytes(b"half unpacked")
    (copy / "cc/val/index.json").write_text("{")
    (copy / "notes/val/index.json").unlink()
    (copy / "tokenizer/tokenizer.json").write_text("{}")
    problems = "\n".join(verify(copy))
    for name in (
        "shard.00000.mds:",
        "cc/val/index.json: broken",
        "notes/val/index.json: missing",
        "tokenizer/tokenizer.json",
    ):
        assert name in problems


def test_an_index_of_other_data_is_named(copy: Path) -> None:
    shutil.copy(copy / "cc/train/index.json", copy / "wiki/train/index.json")
    assert any("lists other shards" in problem for problem in verify(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obj: obj.update(version=99), "has version 99"),
        (lambda obj: obj.update(domains={}), "lists no domain"),
        (lambda obj: obj.pop("seq_len"), "is broken"),
        (lambda obj: obj["domains"]["cc"].pop("val"), "is broken"),
        (lambda obj: obj["domains"]["cc"]["val"].update(surprise=1), "is broken"),
        (lambda obj: obj.update(tokenizer=3), "is broken"),
    ],
)
def test_broken_manifests(copy: Path, change: object, message: str) -> None:
    obj = json.loads((copy / "manifest.json").read_bytes())
    change(obj)  # type: ignore[operator]
    (copy / "manifest.json").write_text(json.dumps(obj))
    with pytest.raises(UserError, match=message):
        load_manifest(copy)


def test_missing_and_empty_folders(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data folder .*mohd prepare"):
        load_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        load_manifest(tmp_path / "empty")
    (copy / "manifest.json").write_bytes(b"")
    with pytest.raises(UserError, match="not valid JSON"):
        load_manifest(copy)


def test_a_manifest_comes_back(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    save_manifest(prepared[1], tmp_path)
    assert load_manifest(tmp_path) == prepared[1]
    assert set(prepared[1].summary()["domains"]) == set(SIZES)
