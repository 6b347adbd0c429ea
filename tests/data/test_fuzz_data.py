"""Whatever the bytes: what reads data works, or says in one line what is wrong; no other exception gets out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mohd_train import checkpoint
from mohd_train.config.schema import DataConfig
from mohd_train.data import units
from mohd_train.data.manifest import load_manifest
from mohd_train.data.prepare import Request, prepare
from mohd_train.data.raw import parse_row
from mohd_train.data.streaming import build_eval_loaders, build_train_loader, check_data
from mohd_train.data.tokenizer import load_tokenizer
from mohd_train.data.verify import verify
from mohd_train.errors import UserError

SLOW = settings(
    deadline=None, derandomize=True, max_examples=12, database=None, suppress_health_check=list(HealthCheck)
)
QUICK = settings(SLOW, max_examples=150)
SHARDS = ["cc/train/shard.00000.mds.zstd", "wiki/val/shard.00000.mds.zstd"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A file cut short, with bytes changed, with something in it, or replaced."""
    kind = draw(st.sampled_from(["cut", "change", "insert", "replace"]))
    at = draw(st.floats(0, 1))
    some = draw(st.binary(min_size=1, max_size=40))

    def apply(content: bytes) -> bytes:
        place = min(int(at * len(content)), max(len(content) - 1, 0))
        if kind == "cut":
            return content[:place]
        if kind == "change":
            return content[:place] + some + content[place + len(some) :]
        if kind == "insert":
            return content[:place] + some + content[place:]
        return some

    return apply


@st.composite
def other_json(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One value of a JSON file replaced by another, or gone."""
    steps, value, drop = draw(st.lists(st.integers(0, 5), min_size=1, max_size=7)), draw(JSON), draw(st.booleans())

    def apply(content: bytes) -> bytes:
        tree: Any = json.loads(content)
        node = tree
        for depth, step in enumerate(steps):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[step % len(keys)]
            inner = node[key]
            if depth == len(steps) - 1 or not isinstance(inner, (dict, list)) or not inner:
                if drop:
                    del node[key]
                else:
                    node[key] = value
                break
            node = inner
        return json.dumps(tree).encode()

    return apply


def harmless(work: Callable[[], Any]) -> bool:
    """Whether ``work`` ran through; a UserError of one line is the other way."""
    text: str | None = None
    try:
        work()
    except UserError as error:
        text = str(error)
    assert text is None or (text.strip() and "\n" not in text)
    return text is None


def config_of(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(local=str(folder), domains={"cc": 3.0, "wiki": 1.0}, num_workers=0, **values)


def read_all(config: DataConfig) -> None:
    """What a run does with data: the checks, an epoch, the validation."""
    manifest = check_data(config, vocab_size=64, seq_len=16)
    loader = build_train_loader(config, manifest, global_batch_size=8, device_batch_size=8, seed=1)
    seen = 0
    for batch in loader:
        assert batch["input_ids"].shape == (8, 16)
        assert int(batch["input_ids"].max()) < 1 << 16
        seen += 1
    assert seen == len(loader)  # never an epoch that ends early in silence
    for part in build_eval_loaders(config, manifest, device_batch_size=4).values():
        for batch in part:
            assert batch["input_ids"].dtype == torch.int64


@QUICK
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_row(line: bytes) -> None:
    text, problem = parse_row(line)
    assert (text is None) != (problem is None)


@SLOW
@given(apply=damage(), suffix=st.sampled_from(["", ".gz", ".zst"]))
def test_any_raw_file(
    apply: Callable[[bytes], bytes], suffix: str, pieces: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the reader's own steps: processes would make this slow."""
    import gzip

    import zstandard

    from mohd_train.data.raw import find_sources, unpacked_units

    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    folder = tmp_path_factory.mktemp("raw")
    rows = b"".join(json.dumps({"text": f"row {i} of text"}).encode() + b"\n" for i in range(20))
    (folder / f"cc.jsonl{suffix}").write_bytes(apply(pack(rows)))
    tokenizer = load_tokenizer(str(pieces))

    def read() -> None:
        source = find_sources(folder).domains["cc"][0]
        parts = [lines for lines, _ in unpacked_units(source, 200)] if suffix else [source.path.read_bytes()]
        for number, lines in enumerate(parts):
            info = units.tokenize_unit(units.Job(folder / f"{number}.npz", source.path, lines=lines), tokenizer)
            assert info.documents + len(info.bad) <= info.lines

    harmless(read)


@SLOW
@given(
    apply=damage() | other_json(), name=st.sampled_from(["manifest.json", "cc/train/index.json", "wiki/val/index.json"])
)
def test_any_manifest_and_index(
    apply: Callable[[bytes], bytes], name: str, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.mds", ".lock"))
    (folder / name).write_bytes(apply((folder / name).read_bytes()))
    harmless(lambda: verify(folder))
    harmless(lambda: load_manifest(folder).summary())
    harmless(lambda: read_all(config_of(folder)))
    harmless(lambda: read_all(config_of(folder.with_name("cache"), remote=str(folder), download_retry=1)))


@SLOW
@given(
    apply=damage(),
    name=st.sampled_from(SHARDS),
    verified=st.booleans(),
)
def test_any_shard(
    apply: Callable[[bytes], bytes], name: str, verified: bool, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without hashes too, where bytes may be wrong but must not break anything."""
    folder = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.mds", ".lock"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(apply(whole))
    read = harmless(lambda: read_all(config_of(folder, verify=verified)))
    assert not (read and verified) or apply(whole) == whole


@SLOW
@given(apply=damage(), name=st.sampled_from(["model", "tokenizer.json", "tokenizer_config.json"]))
def test_any_tokenizer(
    apply: Callable[[bytes], bytes], name: str, pieces: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    if name == "model":
        (folder / "pieces.model").write_bytes(apply(pieces.read_bytes()))
        harmless(lambda: load_tokenizer(str(folder / "pieces.model")).encode(["some text"]))
        return
    load_tokenizer(str(pieces)).hf.save_pretrained(folder)
    (folder / name).write_bytes(apply((folder / name).read_bytes()))
    harmless(lambda: load_tokenizer(str(folder)).encode(["some text"]))


@SLOW
@given(apply=damage())
def test_any_checkpoint(apply: Callable[[bytes], bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "ep0-ba1-rank0.pt"
    torch.save({"state": {"model": {"model.a": torch.zeros(4)}, "callbacks": {"RunMetadata": {"plan": {}}}}}, path)
    path.write_bytes(apply(path.read_bytes()))
    harmless(lambda: checkpoint.open(path).tensors())


def test_a_preparation_of_garbage(tmp_path: Path, pieces: Path) -> None:
    """As a whole, once: with its processes."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "cc.jsonl").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "raw" / "wiki.jsonl.zst").write_bytes(b"no zstd")
    request = Request(str(tmp_path / "raw"), str(tmp_path / "out"), str(pieces), workers=1, show_progress=False)
    with pytest.raises(UserError, match=r"wiki.jsonl.zst is truncated or corrupt|bad rows"):
        prepare(request)


def test_an_index_on_storage_is_compared_with_the_manifest(data: Path, tmp_path: Path) -> None:
    """Found by the tests above: streaming takes it as it is, and would fail in many ways, or wait for ever."""
    folder = Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds", ".lock")))
    index = folder / "cc/train/index.json"
    tree = json.loads(index.read_bytes())
    changes: list[tuple[str, Any]] = [("compression", 10**9), ("samples", -1), ("column_encodings", [1.5])]
    for key, value in changes:
        shards = [tree["shards"][0] | {key: value}, *tree["shards"][1:]]
        index.write_text(json.dumps(tree | {"shards": shards}))
        config = config_of(tmp_path / f"cache-{key}", remote=str(folder), download_retry=1)
        with pytest.raises(UserError, match=r"cc/train/index.json: "):
            check_data(config, vocab_size=64, seq_len=16)
        assert any("cc/train/index.json" in problem for problem in verify(folder))
    index.unlink()
    with pytest.raises(UserError, match=r"index.json can't be downloaded"):
        check_data(config_of(tmp_path / "cache", remote=str(folder), download_retry=1), vocab_size=64, seq_len=16)


def test_a_broken_validation_shard_is_named(data: Path, tmp_path: Path) -> None:
    """Found by the tests above: without hashes, the packing's own exception came out."""
    folder = Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds", ".lock")))
    config = config_of(folder, verify=False)
    manifest = check_data(config, vocab_size=64, seq_len=16)
    shard = folder / "wiki/val/shard.00000.mds.zstd"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"wiki/val/shard.00000.mds: can't be fetched, unpacked or read"):
        list(build_eval_loaders(config, manifest, device_batch_size=4)["wiki"])
