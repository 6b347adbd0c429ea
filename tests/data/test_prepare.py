"""Preparation against a plain one, whatever the workers, units and kills; and its refusals."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from data.conftest import SEQ_LEN, SIZES
from data.data_support import make_texts, naive_samples, stored_samples, tree, write_rows
from filelock import FileLock
from transformers import AutoTokenizer

from mohd_train.checkpoint.identity import tokenizer_sha256
from mohd_train.data import prepare as module
from mohd_train.data import workers
from mohd_train.data.manifest import Manifest, save_manifest
from mohd_train.data.prepare import Preparation, Request, prepare, prepare_shard
from mohd_train.data.raw import find_sources
from mohd_train.data.tokenizer import load_tokenizer
from mohd_train.data.workers import WorkerPool
from mohd_train.errors import UserError


def request(raw: Path, out: Path, pieces: Path, **options: Any) -> Request:
    settings = {"seq_len": SEQ_LEN, "val_tokens": 1500, "workers": 2, "show_progress": False} | options
    return Request(str(raw), str(out), str(pieces), **settings)


def texts_of(raw: Path, domain: str) -> list[str]:
    return [json.loads(line)["text"] for path in sorted((raw / domain).glob("*.jsonl")) for line in open(path)]


def test_samples_equal_a_plain_preparation(raw: Path, pieces: Path, tmp_path: Path) -> None:
    manifest = prepare(request(raw, tmp_path / "out", pieces, val_tokens=0)).manifest
    for domain, count in SIZES.items():
        expected = naive_samples(texts_of(raw, domain), pieces, SEQ_LEN)
        assert np.array_equal(stored_samples(tmp_path / "out" / domain / "train"), expected)
        split = manifest.domains[domain]["train"]
        assert (split.documents, split.samples, split.tokens) == (count, len(expected), expected.size)
        assert manifest.domains[domain]["val"].samples == 0
        assert sum(source.documents for source in split.sources) == count
    assert not (tmp_path / "out" / ".work").exists()


def decoded(folder: Path, pieces: Path) -> list[list[int]]:
    """Documents of a split as ids between BOS and EOS; those cut at its end left out."""
    ids = stored_samples(folder).ravel()
    ends = np.flatnonzero(ids == 2) + 1
    return [part.tolist() for part in np.split(ids, ends)[:-1]]


def test_train_and_validation_share_no_document(raw: Path, pieces: Path, prepared: tuple[Path, Manifest]) -> None:
    out, manifest = prepared
    for domain, count in SIZES.items():
        train, val = (decoded(out / domain / split, pieces) for split in ("train", "val"))
        assert not {tuple(d) for d in train} & {tuple(d) for d in val}
        splits = manifest.domains[domain]
        assert splits["train"].documents + splits["val"].documents == count
        assert splits["val"].samples > 0


@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, 1 << 24), (3, 700), (2, 5000)])
def test_the_output_does_not_depend_on_workers_or_units(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path, workers: int, unit_bytes: int
) -> None:
    prepare(request(raw, tmp_path / "out", pieces, workers=workers, unit_bytes=unit_bytes))
    mine, theirs = tree(tmp_path / "out"), tree(prepared[0])
    assert mine == {name: content for name, content in theirs.items() if not name.endswith((".mds", ".lock"))}


def test_compressed_files_give_the_same_samples(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    for path in raw.rglob("*.jsonl"):
        target = tmp_path / "raw" / path.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "a.jsonl":
            target.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        else:
            target.with_suffix(".jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
    prepare(request(tmp_path / "raw", tmp_path / "out", pieces, unit_bytes=3000))
    for domain in SIZES:
        for split in ("train", "val"):
            name = f"{domain}/{split}"
            assert np.array_equal(stored_samples(tmp_path / "out" / name), stored_samples(prepared[0] / name))


def slow_prepare(asked: Request) -> None:
    """Prepares with a pause after each result, so that a kill falls in between."""
    original = workers.WorkerPool._finished

    def finished(running: Any) -> Any:
        for item in original(running):
            time.sleep(0.02)
            yield item

    workers.WorkerPool._finished = staticmethod(finished)
    prepare(asked)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9])
def test_a_killed_preparation_resumes_to_the_same_bytes(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path, fraction: float
) -> None:
    asked = request(raw, tmp_path / "out", pieces, unit_bytes=2000)
    child = multiprocessing.get_context("fork").Process(target=slow_prepare, args=(asked,))
    child.start()
    units = tmp_path / "out" / ".work" / "units"
    total = sum(-(-path.stat().st_size // 2000) for path in raw.rglob("*.jsonl"))
    deadline = time.monotonic() + 30
    while child.is_alive() and len(list(units.rglob("*.npz"))) < fraction * total:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not prepare(asked).already_done
    expected = {name: content for name, content in tree(prepared[0]).items() if not name.endswith((".mds", ".lock"))}
    assert tree(tmp_path / "out") == expected


def test_a_cut_off_packing_is_done_again(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(raw, tmp_path / "out", pieces)
    write, calls = module.write_atomic, []

    def failing(path: Path, data: bytes) -> None:
        if path.parent.name == "packed":
            calls.append(path)
            if len(calls) == 2:  # one domain recorded, one in place but not recorded
                raise RuntimeError("cut off")
        write(path, data)

    monkeypatch.setattr(module, "write_atomic", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        prepare(asked)
    monkeypatch.undo()
    half = tmp_path / "out" / calls[1].stem / "train" / "shard.00000.mds.zstd"
    half.write_bytes(b"half")  # what stands unrecorded is not trusted
    prepare(asked)
    expected = {name: content for name, content in tree(prepared[0]).items() if not name.endswith((".mds", ".lock"))}
    assert tree(tmp_path / "out") == expected


def test_bad_rows_are_reported_with_exact_lines(pieces: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "raw" / "cc" / "a.jsonl", make_texts(200, 1))
    lines = path.read_bytes().split(b"\n")
    lines[16], lines[59], lines[120] = b"{broken", b"", b'{"text": "\xff"}'
    path.write_bytes(b"\n".join(lines)[:-1])  # and no newline at the end
    packed = tmp_path / "raw" / "cc" / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "fine"}\n\n{"text": ""}\n'))
    asked = request(tmp_path / "raw", tmp_path / "out", pieces, unit_bytes=500, max_bad_rows=2)
    with pytest.raises(
        UserError, match=r"3 bad rows among 201, more than the 2 .*cc/a\.jsonl:17: invalid JSON.*a\.jsonl:121"
    ):
        prepare(asked)
    manifest = prepare(dataclasses.replace(asked, max_bad_rows=0.05)).manifest
    assert manifest.bad_rows == 3
    report = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in report] == [
        ("cc/a.jsonl", 17),
        ("cc/a.jsonl", 121),
        ("cc/b.jsonl.gz", 3),
    ]
    splits = manifest.domains["cc"]
    assert splits["train"].documents + splits["val"].documents == 198


class Backwards(WorkerPool):
    """Does the last of every four jobs first."""

    def run(self, function: Any, jobs: Iterable[Any]) -> Iterator[Any]:
        window: list[Any] = []
        for job in jobs:
            window.append(job)
            if len(window) == 4:
                yield from self._backwards(function, window)
                window = []
        yield from self._backwards(function, window)

    def _backwards(self, function: Any, window: list[Any]) -> Iterator[Any]:
        for job in reversed(window):
            yield from super().run(function, [job])


def test_lines_are_exact_where_bad_rows_stop_it_early(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units are done out of order, and those behind a gap are there from before."""
    path = write_rows(tmp_path / "raw" / "cc" / "a.jsonl", make_texts(200, 1))
    lines = path.read_bytes().split(b"\n")
    for line in (17, 26, 31, 150):
        lines[line - 1] = b"{broken"
    path.write_bytes(b"\n".join(lines))
    asked = request(tmp_path / "raw", tmp_path / "out", pieces, unit_bytes=500, max_bad_rows=2)
    monkeypatch.setattr("mohd_train.data.prepare.WorkerPool", Backwards)
    with pytest.raises(UserError, match=r"cc/a\.jsonl:17: .*cc/a\.jsonl:26: .*cc/a\.jsonl:31: ") as caught:
        prepare(asked)
    assert "3 bad rows among" in str(caught.value)
    with pytest.raises(UserError, match="4 bad rows"):
        prepare(dataclasses.replace(asked, max_bad_rows=3))
    units = sorted((tmp_path / "out").rglob("*.npz"))
    units[len(units) // 3].unlink()  # a kill left the units behind it
    with pytest.raises(UserError, match=r"cc/a\.jsonl:17: .*cc/a\.jsonl:26: .*cc/a\.jsonl:31: "):
        prepare(asked)


def test_copies_across_domains_are_never_on_both_sides(pieces: Path, tmp_path: Path) -> None:
    shared = make_texts(150, 5)
    write_rows(tmp_path / "raw" / "cc" / "a.jsonl", shared + make_texts(50, 6))
    write_rows(tmp_path / "raw" / "wiki" / "a.jsonl", shared + shared[:40])
    manifest = prepare(request(tmp_path / "raw", tmp_path / "out", pieces)).manifest
    sides = {
        split: {tuple(d) for domain in ("cc", "wiki") for d in decoded(tmp_path / "out" / domain / split, pieces)}
        for split in ("train", "val")
    }
    assert sides["val"]
    assert not sides["train"] & sides["val"]
    splits = [manifest.domains[domain] for domain in ("cc", "wiki")]
    assert sum(s["train"].held_out for s in splits) > 0
    assert sum(s["train"].documents + s["val"].documents + s["train"].held_out for s in splits) == 390


def test_given_validation_is_used_whole_and_kept_out_of_train(pieces: Path, tmp_path: Path) -> None:
    val = make_texts(30, 9)
    write_rows(tmp_path / "raw" / "cc.jsonl", make_texts(100, 8) + val[:10])
    write_rows(tmp_path / "raw" / "cc.val.jsonl", val)
    manifest = prepare(request(tmp_path / "raw", tmp_path / "out", pieces)).manifest
    splits = manifest.domains["cc"]
    assert (splits["train"].documents, splits["train"].held_out, splits["val"].documents) == (100, 10, 30)
    assert np.array_equal(stored_samples(tmp_path / "out" / "cc" / "val"), naive_samples(val, pieces, SEQ_LEN))


def test_done_is_said_and_other_preparations_are_refused(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out = prepared[0]
    assert prepare(request(raw, out, pieces, workers=1)).already_done
    with pytest.raises(UserError, match=r"another preparation \(other --seq-len\)"):
        prepare(request(raw, out, pieces, seq_len=64))
    with pytest.raises(UserError, match=r"other --val-tokens, raw files or --domains"):
        prepare(request(raw, out, pieces, val_tokens=3, domains=("cc",)))
    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match="holds other files"):
        prepare(request(raw, tmp_path, pieces))
    with pytest.raises(UserError, match="at least 2 tokens"):
        prepare(request(raw, tmp_path / "x", pieces, seq_len=1))


def test_a_tokenizer_recorded_by_an_earlier_version_is_known(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """Its hash left out the flags of added tokens, and was written without a mark."""
    out = Path(shutil.copytree(prepared[0], tmp_path / "out"))
    manifest = prepared[1]
    assert manifest.tokenizer.sha256.startswith("v2:")
    old = tokenizer_sha256(AutoTokenizer.from_pretrained(out / "tokenizer"), version=1)
    tokenizer = dataclasses.replace(manifest.tokenizer, sha256=old)
    settings = manifest.settings | {"tokenizer": old}
    save_manifest(dataclasses.replace(manifest, tokenizer=tokenizer, settings=settings), out)
    assert prepare(request(raw, out, pieces, workers=1)).already_done
    save_manifest(dataclasses.replace(manifest, settings=manifest.settings | {"tokenizer": "0" * 64}), out)
    with pytest.raises(UserError, match=r"another preparation \(other tokenizer\)"):
        prepare(request(raw, out, pieces))


def test_two_preparations_of_one_folder_do_not_mix(
    raw: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_WAIT", 0.1)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match="another preparation is running"),
    ):
        prepare(request(raw, tmp_path / "out", pieces))
    assert not prepare(request(raw, tmp_path / "out", pieces)).already_done


def test_a_full_disk_is_said_and_resumed_from(
    raw: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_manifest", full)
    with pytest.raises(UserError, match=r"disk of .* is full; free space"):
        prepare(request(raw, tmp_path / "out", pieces))
    monkeypatch.undo()
    assert not prepare(request(raw, tmp_path / "out", pieces)).already_done


def test_a_domain_without_a_usable_row_is_refused(pieces: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "raw" / "cc" / "a.jsonl", make_texts(100, 8))
    (tmp_path / "raw" / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match="domain empty has no usable row"):
        prepare(request(tmp_path / "raw", tmp_path / "out", pieces))


@pytest.mark.real_data
def test_real_rows_equal_a_plain_preparation(real_data: Path, tmp_path: Path) -> None:
    for domain, name in (("github", "sample_github2.jsonl"), ("cc", "sample_cc2.jsonl")):
        lines = (real_data / "redpajama_sample" / domain / name).read_bytes().splitlines(keepends=True)[:20]
        (tmp_path / "raw" / domain).mkdir(parents=True)
        (tmp_path / "raw" / domain / "a.jsonl").write_bytes(b"".join(lines))
    model = real_data / "llama_tokenizer.model"
    prepare(request(tmp_path / "raw", tmp_path / "out", model, val_tokens=0, seq_len=256, unit_bytes=30_000))
    for domain in ("github", "cc"):
        expected = naive_samples(texts_of(tmp_path / "raw", domain), model, 256)
        assert np.array_equal(stored_samples(tmp_path / "out" / domain / "train"), expected)


def test_shards_on_several_machines_give_the_same_bytes(
    raw: Path, pieces: Path, prepared: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three parts at once, in processes; the third never starts. Then the finishing call, which makes what is missing."""
    out = tmp_path / "out"
    asked = request(raw, out, pieces, workers=1, unit_bytes=4000)
    parts = [Preparation(asked, find_sources(str(raw), None), load_tokenizer(str(pieces))).part(i, 3) for i in range(3)]
    assert all(parts)
    assert len({one for part in parts for one in part}) == sum(map(len, parts))
    processes = [multiprocessing.get_context("spawn").Process(target=prepare_shard, args=(asked, i, 3)) for i in (0, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    made = sorted((out / ".work" / "units").rglob("*.npz"))
    assert made
    times = {path: path.stat().st_mtime_ns for path in made}
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # so that the units can be looked at
    prepare(asked)
    monkeypatch.undo()
    assert {path: path.stat().st_mtime_ns for path in made} == times
    shutil.rmtree(out / ".work")
    assert tree(out) == tree(prepared[0])
    assert prepare_shard(asked, 1, 3)[0] == len(parts[1])  # a late one finds it finished
    assert not (out / ".work").exists()


def test_a_shard_at_work_is_not_overtaken(raw: Path, pieces: Path, tmp_path: Path) -> None:
    asked = request(raw, tmp_path / "out", pieces)
    prepare_shard(asked, 0, 2)
    held = FileLock(tmp_path / "out" / ".work" / "shards" / "0-of-2")
    with held:
        with pytest.raises(UserError, match=r"shard 0 of 2 is running .*finish when all are done"):
            prepare(asked)
        with pytest.raises(UserError, match=r"shard 0 of 2 is already running"):
            prepare_shard(asked, 0, 2)
    with pytest.raises(UserError, match="other --seq-len"):
        prepare_shard(dataclasses.replace(asked, seq_len=SEQ_LEN + 1), 1, 2)
    assert not prepare(asked).already_done
    for number, count in ((2, 2), (-1, 2)):
        with pytest.raises(UserError, match="numbered from 0 to 1"):
            prepare_shard(asked, number, count)


def test_a_shard_that_stops_at_bad_rows_says_so(pieces: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "cc"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("no json\n" * 400)
    asked = request(tmp_path / "raw", tmp_path / "out", pieces, max_bad_rows=5, unit_bytes=200, workers=1)
    with pytest.raises(UserError, match=r"shard 0 of 1 stopped at \d+ bad rows"):
        prepare_shard(asked, 0, 1)
