"""Faults of a preparation and of prepared data: two at once, raw files that change, names that lead elsewhere, damage."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from data.data_support import make_texts, train_pieces, tree, write_rows
from support import fault_table

from mohd_train.config.schema import DataConfig
from mohd_train.data import pack, prepare, units
from mohd_train.data.manifest import load_manifest
from mohd_train.data.prepare import Request
from mohd_train.data.raw import find_sources
from mohd_train.data.streaming import build_eval_loaders, build_train_loader, check_data
from mohd_train.data.verify import verify
from mohd_train.errors import UserError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for seed, domain in enumerate(("cc", "wiki")):
        write_rows(tmp_path / "raw" / domain / "a.jsonl", make_texts(150, seed))
    return tmp_path / "raw"


def request(raw: Path, out: Path, pieces: Path, **options: Any) -> Request:
    settings = {
        "seq_len": SEQ_LEN,
        "val_tokens": 500,
        "workers": 1,
        "show_progress": False,
        "unit_bytes": 2000,
    } | options
    return Request(str(raw), str(out), str(pieces), **settings)


def forked(work: Any, *args: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def killed_while_packing(asked: Request, packing: Path) -> None:
    """Prepares, and kills its own process group, workers included, if it ever gets to packing."""
    os.setsid()
    theirs = pack.pack_domain

    def pack_domain(job: pack.PackJob) -> Any:
        shutil.rmtree(job.folder, ignore_errors=True)  # what packing begins with
        packing.touch()
        os.killpg(0, signal.SIGKILL)
        return theirs(job)

    prepare.pack_domain = pack_domain
    prepare.prepare(asked)


@pytest.mark.fault(
    "one preparation started twice at once", happened="the second waits, then finds it done; shards stay whole"
)
def test_two_preparations_at_once(raw: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one looks for the manifest, then waits for the first one's lock, and is killed if it starts over."""
    asked, packing = request(raw, tmp_path / "out", pieces), tmp_path / "packing"
    second: list[Any] = []
    save = prepare.save_manifest

    def save_manifest(*args: Any) -> None:
        second.append(forked(killed_while_packing, asked, packing))  # it sees no manifest yet
        time.sleep(3)
        save(*args)

    monkeypatch.setattr(prepare, "save_manifest", save_manifest)
    prepare.prepare(asked)
    second[0].join(60)
    monkeypatch.undo()
    assert prepare.prepare(asked).already_done
    assert verify(tmp_path / "out") == []
    assert not packing.exists()
    assert second[0].exitcode == 0
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    fault_table.record(lost=None)


@pytest.mark.fault("a preparation beside a live one", happened="refused after a while, names the process")
def test_a_preparation_beside_a_live_one(
    raw: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(raw, tmp_path / "out", pieces)
    monkeypatch.setattr(prepare, "LOCK_WAIT", 0.2)
    theirs, refused = prepare.save_manifest, []

    def save_manifest(*args: Any) -> None:
        with pytest.raises(
            UserError, match=rf"another preparation is running in .*process {os.getpid()} on "
        ) as caught:
            prepare.prepare(asked)
        refused.append(str(caught.value))
        theirs(*args)

    monkeypatch.setattr(prepare, "save_manifest", save_manifest)
    assert not prepare.prepare(asked).already_done
    assert len(refused) == 1
    fault_table.record(lost=None)


@pytest.mark.fault("a raw file changes while it is prepared", happened="stopped, file named; done over when run again")
@pytest.mark.parametrize("kind", ["truncated", "rewritten", "grown", "removed"])
def test_a_raw_file_changes(
    kind: str, raw: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = raw / "cc" / "a.jsonl"
    whole = file.read_bytes()
    asked = request(raw, tmp_path / "out", pieces)
    jobs = units._jobs

    def changing(*args: Any) -> Any:
        for number, job in enumerate(jobs(*args)):
            if number == 2:
                time.sleep(0.3)  # the first unit is done
                if kind == "removed":
                    file.unlink()
                else:
                    middle = len(whole) // 2
                    changed = whole[:middle] + b" " * 100 + whole[middle + 100 :]
                    file.write_bytes({"truncated": whole[:500], "grown": whole + whole, "rewritten": changed}[kind])
            yield job

    monkeypatch.setattr(units, "_jobs", changing)
    with pytest.raises(UserError, match=r"cc/a\.jsonl (changed|is gone)"):
        prepare.prepare(asked)
    monkeypatch.undo()
    file.write_bytes(whole)
    assert not prepare.prepare(asked).already_done
    prepare.prepare(request(raw, tmp_path / "other", pieces))
    assert tree(tmp_path / "out") == tree(tmp_path / "other")
    fault_table.record(lost=None)


@pytest.mark.fault("a unit in .work is corrupt", happened="named and removed; made anew when run again")
@pytest.mark.parametrize("kind", ["cut", "garbage", "flipped"])
def test_a_corrupt_unit(kind: str, raw: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(raw, tmp_path / "out", pieces)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(prepare, "report_bad_rows", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        prepare.prepare(asked)
    monkeypatch.undo()
    unit = sorted((tmp_path / "out" / ".work" / "units").rglob("*.npz"))[3]
    whole = unit.read_bytes()
    middle = bytearray(whole)
    middle[200] ^= 255  # among the tokens, which come first
    unit.write_bytes({"cut": whole[:-40], "garbage": b"garbage", "flipped": bytes(middle)}[kind])
    with pytest.raises(UserError, match=rf"{unit.name} .*is corrupt.*run the same command again"):
        prepare.prepare(asked)
    assert not prepare.prepare(asked).already_done
    prepare.prepare(request(raw, tmp_path / "other", pieces))
    assert tree(tmp_path / "out") == tree(tmp_path / "other")
    fault_table.record(lost=None)


@pytest.mark.fault("raw files behind links", happened="followed, loops left out by name; a dangling one refused")
def test_links_are_followed(raw: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    write_rows(away / "deep" / "b.jsonl", make_texts(5, 8))
    write_rows(away / "domain" / "c.jsonl", make_texts(5, 9))
    (raw / "cc" / "linked").symlink_to(away / "deep")
    (raw / "notes").symlink_to(away / "domain")
    (raw / "wiki" / "loop").symlink_to(raw / "wiki")
    (raw / "wiki" / "hub.jsonl").symlink_to(away / "deep" / "b.jsonl")
    found = find_sources(raw)
    names = {domain: [source.name for source in files] for domain, files in found.domains.items()}
    assert names == {
        "cc": ["cc/a.jsonl", "cc/linked/b.jsonl"],
        "notes": ["notes/c.jsonl"],
        "wiki": ["wiki/a.jsonl", "wiki/hub.jsonl"],
    }
    notes = "\n".join(found.notes)
    assert "wiki/loop" in notes
    assert "cc/linked/b.jsonl and wiki/hub.jsonl are one file" in notes
    for name in ("cc/gone.jsonl", "gone"):
        (raw / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=rf"{name} is a link to .*nowhere, which doesn't exist"):
            find_sources(raw)
        (raw / name).unlink()
    fault_table.record(lost=None)


@pytest.mark.fault("raw files that aren't rows", happened="each is named with the reason; a pipe is refused")
def test_what_is_left_out_is_named(raw: Path) -> None:
    for name in ("README.md", "cc/b.json.gz", "cc/c.JSONL", "cc/.hidden.jsonl"):
        write_rows(raw / name, make_texts(3, 5))
    found = find_sources(raw)
    assert [source.name for source in found.domains["cc"]] == ["cc/a.jsonl", "cc/c.JSONL"]
    notes = "\n".join(found.notes)
    assert all(name in notes for name in ("README.md", "cc/b.json.gz", "cc/.hidden.jsonl"))
    os.mkfifo(raw / "cc" / "pipe.jsonl")
    with pytest.raises(UserError, match=r"cc/pipe\.jsonl is not a regular file"):
        find_sources(raw)
    fault_table.record(lost=None)


@pytest.mark.fault("validation and test files among raw files", happened="names mean what they say; test is left out")
def test_names_of_splits(raw: Path, pieces: Path, tmp_path: Path) -> None:
    for name in ("cc/train.jsonl", "cc/val.jsonl", "cc/validation/x.jsonl", "cc/test.jsonl", "wiki-test-00001.jsonl"):
        write_rows(raw / name, make_texts(9, len(name)))
    write_rows(raw / "notes_validation-00000-of-00001.jsonl", make_texts(30, 77))
    write_rows(raw / "notes-00000-of-00001.jsonl", make_texts(60, 78))
    found = find_sources(raw)
    splits = {source.name: source.split for files in found.domains.values() for source in files}
    assert splits == {
        "cc/a.jsonl": "train",
        "cc/train.jsonl": "train",
        "cc/val.jsonl": "val",
        "cc/validation/x.jsonl": "val",
        "notes-00000-of-00001.jsonl": "train",
        "notes_validation-00000-of-00001.jsonl": "val",
        "wiki/a.jsonl": "train",
    }
    assert "cc/test.jsonl, wiki-test-00001.jsonl" in "\n".join(found.notes)
    manifest = prepare.prepare(request(raw, tmp_path / "out", pieces)).manifest
    assert {source.file for source in manifest.domains["cc"]["val"].sources} == {
        "cc/val.jsonl",
        "cc/validation/x.jsonl",
    }
    fault_table.record(lost=None)


@pytest.mark.fault("a domain with a name that is taken", happened="refused before anything is read")
@pytest.mark.parametrize(
    "name", ["manifest.json", "bad_rows.jsonl", "tokenizer", "train", "eval", "validation", "x" * 120]
)
def test_names_of_domains(name: str, raw: Path, pieces: Path, tmp_path: Path) -> None:
    write_rows(raw / name / "a.jsonl", make_texts(60, 3))
    with pytest.raises(UserError, match=f"a domain can't be called '{name}'"):
        prepare.prepare(request(raw, tmp_path / "out", pieces))
    assert not (tmp_path / "out").exists()
    fault_table.record(lost=None)


def config_of(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(local=str(folder), domains={"cc": 1.0}, num_workers=0, download_retry=1, **values)


def check(config: DataConfig) -> Any:
    return check_data(config, vocab_size=64, seq_len=16)


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Path:
    """A copy of the data that may be broken; nothing of it is unpacked."""
    return Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds", ".lock")))


@pytest.mark.fault(
    "a manifest with names that lead elsewhere", happened="refused; nothing is written outside the cache"
)
@pytest.mark.parametrize("kind", ["tokenizer", "domain", "shard", "raw"])
@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", ""])
def test_names_stay_in_their_folder(kind: str, name: str, own: Path, tmp_path: Path) -> None:
    obj = json.loads((own / "manifest.json").read_bytes())
    shard = obj["domains"]["cc"]["train"]["shards"][0]
    if kind == "tokenizer":
        obj["tokenizer"]["files"][name] = "0" * 64
    elif kind == "domain":
        obj["domains"][name] = obj["domains"]["cc"]
    else:
        shard["file" if kind == "shard" else "raw_file"] = name
    (own / "manifest.json").write_text(json.dumps(obj))
    (tmp_path / "escaped").write_text("remote")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="must be a plain name"):
        check(config_of(tmp_path / "deep" / "cache", remote=str(own)))
    after = tree(tmp_path)
    assert {key: after[key] for key in after if not key.startswith("deep/cache")} == before
    with pytest.raises(UserError, match="must be a plain name"):
        load_manifest(own)
    fault_table.record(lost=None)


@pytest.mark.fault(
    "a cached shard of remote data is damaged", happened="found at the start, shard named; goes on once removed"
)
@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_cached_shard_is_damaged(kind: str, own: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache", remote=str(own))
    manifest = check(config)
    expected = [batch["input_ids"].tolist() for batch in build_train_loader(config, manifest, **BATCH)]
    cached = next((tmp_path / "cache" / "cc" / "train").glob("*.mds"))
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.write_bytes(bytes(content) if kind == "flipped" else bytes(content[:-8]))
    with pytest.raises(UserError, match=rf"cache/cc/train/{cached.name}: .*remove it, and it is downloaded again"):
        check(config)
    with contextlib.nullcontext() if kind == "flipped" else pytest.raises(UserError, match="truncated"):
        check(config_of(tmp_path / "cache", remote=str(own), verify=False))
    cached.unlink()
    again = [batch["input_ids"].tolist() for batch in build_train_loader(config, check(config), **BATCH)]
    assert again == expected
    fault_table.record(lost=None)


BATCH: dict[str, Any] = {"global_batch_size": 8, "device_batch_size": 8, "seed": 1}


@pytest.mark.fault("token ids beyond the vocabulary", happened="stopped with one line, shard named")
def test_ids_beyond_the_vocabulary(own: Path) -> None:
    """Data whose manifest was edited, or that a broken tokenizer made: a GPU would only say 'device-side assert'."""
    obj = json.loads((own / "manifest.json").read_bytes())
    obj["tokenizer"]["vocab_size"] = 8
    (own / "manifest.json").write_text(json.dumps(obj))
    config = config_of(own)
    manifest = check_data(config, vocab_size=8, seq_len=16)
    with pytest.raises(UserError, match=r"cc/train/shard\.\d+\.mds.* token id \d+, beyond the vocabulary of 8"):
        list(build_train_loader(config, manifest, **BATCH))
    with pytest.raises(UserError, match=r"cc/val/shard\.\d+\.mds.* token id \d+, beyond the vocabulary of 8"):
        list(build_eval_loaders(config, manifest, device_batch_size=4)["cc"])
    fault_table.record(lost=None)


@pytest.mark.fault("two runs fill one cache with other data", happened="the second is refused, whenever it comes")
def test_one_cache_for_two_data_sets(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with what the cache holds and the first file put there are under one lock."""
    other = Path(shutil.copytree(own, tmp_path / "other"))
    obj = json.loads((other / "manifest.json").read_bytes())
    (other / "manifest.json").write_text(json.dumps(obj | {"notes": ["other"]}))
    start, outcomes = threading.Barrier(2), []

    def fetch(remote: Path) -> None:
        start.wait()
        try:
            check(config_of(tmp_path / "cache", remote=str(remote)))
            outcomes.append("taken")
        except UserError as error:
            outcomes.append("refused" if "is the cache of other data" in str(error) else str(error))

    from mohd_train.data import streaming

    theirs = streaming._download

    def slow(*args: Any) -> None:
        theirs(*args)
        time.sleep(0.1)

    monkeypatch.setattr(streaming, "_download", slow)
    threads = [threading.Thread(target=fetch, args=(remote,)) for remote in (own, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["refused", "taken"]
    fault_table.record(lost=None)
