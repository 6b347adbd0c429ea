"""The loaders of a run: the mix is the plan, and the order survives resumes, epochs, workers and other numbers of processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.conftest import SEQ_LEN
from data.data_support import stored_samples
from transformers import AutoTokenizer

from mohd_train.checkpoint.identity import tokenizer_sha256
from mohd_train.config.schema import DataConfig
from mohd_train.data import datasets
from mohd_train.data.manifest import Manifest, save_manifest
from mohd_train.data.streaming import build_eval_loaders, build_train_loader, check_data, plan_mix
from mohd_train.errors import UserError

MIX = {"cc": 6.0, "notes": 1.0, "wiki": 3.0}
BATCH = 8


@pytest.fixture
def data(prepared: tuple[Path, Manifest], tmp_path: Path) -> DataConfig:
    folder = shutil.copytree(prepared[0], tmp_path / "data", ignore=shutil.ignore_patterns("*.mds", ".lock"))
    return DataConfig(local=str(folder), domains=dict(MIX), num_workers=0)


def loader(data: DataConfig, manifest: Manifest, **options: Any) -> Any:
    return build_train_loader(
        data, manifest, **({"global_batch_size": BATCH, "device_batch_size": BATCH, "seed": 5} | options)
    )


def epochs(of: Any, count: int) -> list[dict[str, torch.Tensor]]:
    return [batch for _ in range(count) for batch in of]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_a_batch_and_the_realized_mix(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    manifest = check_data(data, vocab_size=360, seq_len=SEQ_LEN)
    batches = epochs(loader(data, manifest), 3)
    batch = batches[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((BATCH, SEQ_LEN), torch.int64),
        "labels": ((BATCH, SEQ_LEN), torch.int64),
        "domain": ((BATCH,), torch.int64),
    }
    assert torch.equal(batch["input_ids"], batch["labels"])
    domain = torch.cat([b["domain"] for b in batches])
    plan = plan_mix(data, manifest, len(domain))
    assert plan.domains == ("cc", "notes", "wiki")
    assert torch.bincount(domain).tolist() == [p.samples for p in plan.plans]
    halfway = plan_mix(data, manifest, len(domain) // 2 // BATCH * BATCH)
    assert torch.bincount(domain[: halfway.total_samples]).tolist() == [p.samples for p in halfway.plans]
    assert sum(p.samples for p in plan.plans) == plan.total_samples
    for p, share in zip(plan.plans, (0.6, 0.1, 0.3), strict=True):
        assert abs(p.samples - share * len(domain)) < 3


def test_a_domain_repeats_only_when_all_of_it_was_seen(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    batches = epochs(loader(data, manifest), 3)
    ids, domain = torch.cat([b["input_ids"] for b in batches]), torch.cat([b["domain"] for b in batches])
    for index, name in enumerate(sorted(MIX)):
        stored = {row.tobytes() for row in stored_samples(Path(data.local) / name / "train")}
        seen = [row.tobytes() for row in ids[domain == index].numpy()]
        for lap in range(0, len(seen), len(stored)):
            part = seen[lap : lap + len(stored)]
            assert len(set(part)) == len(part)
            assert set(part) <= stored


@pytest.mark.parametrize("stop", [1, 7, "end", "second"])
def test_resume_is_exact(data: DataConfig, prepared: tuple[Path, Manifest], stop: int | str) -> None:
    manifest = prepared[1]
    whole = loader(data, manifest)
    length = len(whole)
    expected = epochs(whole, 3)
    first = loader(data, manifest)
    done = {"end": length, "second": length + 3}.get(stop, stop) if isinstance(stop, str) else stop
    seen: list[dict[str, torch.Tensor]] = []
    while len(seen) < done:
        for batch in first:
            seen.append(batch)
            if len(seen) == done and done % length:
                break
    # Composer asks after its epoch count has moved on, with no samples seen of the next epoch.
    state = json.loads(json.dumps(first.dataset.state_dict(done % length * BATCH, True)))
    for workers in (0, 2):
        second = loader(dataclasses.replace(data, num_workers=workers), manifest)
        second.dataset.load_state_dict(state)
        assert second.dataset.state_dict(done % length * BATCH, True) == state  # saved again before a step
        rest = epochs(second, 3)[: 3 * length - done]
        assert same(seen + rest, expected)


def test_the_last_batch_of_an_epoch_resumes_too(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    first = loader(data, prepared[1])
    expected = epochs(first, 2)
    again = loader(data, prepared[1])
    epochs(again, 1)
    state = again.dataset.state_dict(len(again) * BATCH, True)  # saved after the batch, before the epoch's end
    second = loader(data, prepared[1])
    second.dataset.load_state_dict(state)
    assert list(second) == []
    assert same(list(second), expected[len(first) :])


def test_a_position_in_other_data_is_refused(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    first = loader(data, manifest)
    next(iter(first))
    state = first.dataset.state_dict(BATCH, True)
    others = [
        loader(dataclasses.replace(data, domains={**MIX, "cc": 1.0}), manifest),
        loader(data, manifest, seed=6),
        loader(data, manifest, global_batch_size=4, device_batch_size=4),
        loader(dataclasses.replace(data, shuffle=False), manifest),
    ]
    for other in others:
        with pytest.raises(UserError, match="other data, or in another mix"):
            other.dataset.load_state_dict(state)


def test_without_shuffling_the_stored_order_is_kept(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    data = dataclasses.replace(data, shuffle=False, domains={"wiki": 1.0})
    ids = torch.cat([batch["input_ids"] for batch in loader(data, prepared[1])]).numpy()
    assert np.array_equal(ids, stored_samples(Path(data.local) / "wiki" / "train")[: len(ids)])


def test_seeds(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    a, b, c = (list(loader(data, prepared[1], seed=seed)) for seed in (5, 5, 6))
    assert same(a, b)
    assert not same(a, c)
    own = dataclasses.replace(data, shuffle_seed=5)
    assert same(a, list(loader(own, prepared[1], seed=6)))


def test_validation_has_every_sample_once_in_order(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    for workers in (0, 2):
        loaders = build_eval_loaders(dataclasses.replace(data, num_workers=workers), prepared[1], device_batch_size=3)
        assert list(loaders) == sorted(MIX)
        for index, (name, one) in enumerate(loaders.items()):
            for _ in range(2):
                batches = list(one)
                ids = torch.cat([batch["input_ids"] for batch in batches]).numpy()
                assert np.array_equal(ids, stored_samples(Path(data.local) / name / "val"))
                assert {int(d) for batch in batches for d in batch["domain"]} == {index}


def run_rank(rank: int, data: DataConfig, state: dict[str, Any], out: Path) -> None:
    """One of two gloo processes: saves what it is given in two epochs, and the validation samples."""
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    datasets._held = None  # as in a process of its own
    manifest = check_data(data, vocab_size=360, seq_len=SEQ_LEN)
    train = loader(data, manifest, device_batch_size=BATCH // 2)
    train.dataset.load_state_dict(state)
    evals = build_eval_loaders(data, manifest, device_batch_size=3)
    val = {name: torch.cat([batch["input_ids"] for batch in one]) for name, one in evals.items()}
    torch.save({"train": epochs(train, 2), "val": val}, out / f"{rank}.pt")
    os._exit(0)


def two_processes(tmp_path: Path, data: DataConfig, state: dict[str, Any]) -> list[dict[str, Any]]:
    out = tmp_path / "ranks"
    out.mkdir()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, data, state, out)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=100)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def test_two_processes_go_on_where_one_stopped(
    data: DataConfig, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    one = loader(data, prepared[1])
    expected = epochs(one, 2)
    for _ in zip(range(3), one, strict=False):
        pass
    state = loader(data, prepared[1]).dataset.state_dict(0, True) | {"epoch": 0, "sample_in_epoch": 3 * BATCH}
    ranks = two_processes(tmp_path, dataclasses.replace(data, num_workers=1), state)
    steps = [
        {key: torch.cat([a[key], b[key]]) for key in a}
        for a, b in zip(ranks[0]["train"], ranks[1]["train"], strict=True)
    ]
    rest = expected[3:]
    assert len(steps) == len(rest)
    for mine, theirs in zip(steps, rest, strict=True):
        rows = [sorted(batch["input_ids"].tolist()) for batch in (mine, theirs)]
        assert rows[0] == rows[1]  # each global batch holds the same samples
    for name in MIX:
        stored = stored_samples(Path(data.local) / name / "val")
        given = [rank["val"][name].numpy() for rank in ranks]
        together = [given[i % 2][i // 2] for i in range(len(stored))]  # beyond these: padding, which Composer drops
        assert np.array_equal(np.array(together), stored)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"local": "nowhere"}, {}, "no data folder nowhere"),
        ({"domains": {"cc": 1.0, "arxiv": 1.0}}, {}, r"data\.domains has 'arxiv', which .* lacks"),
        ({"domains": {"cc": 0.0}}, {}, r"data\.domains\.cc=0\.0: a proportion must be positive"),
        ({"domains": {"arxiv": 1.0}, "optional_domains": ["arxiv"]}, {}, "has none of the domains"),
        ({}, {"seq_len": 64}, r"samples of 32 tokens, the model takes max_seq_len=64"),
        ({}, {"vocab_size": 359}, r"tokenizer of 360 tokens .* vocab_size=359"),
        ({}, {"vocab_size": 32_000}, r"tokenizer of 360 tokens .* vocab_size=32000"),
        ({}, {"tokenizer_sha256": "0" * 64}, "made with another tokenizer"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    data: DataConfig, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_data(dataclasses.replace(data, **change), **({"vocab_size": 360, "seq_len": SEQ_LEN} | options))


def test_data_that_fits_is_accepted(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    sha256 = prepared[1].tokenizer.sha256
    assert check_data(data, vocab_size=384, seq_len=SEQ_LEN, tokenizer_sha256=sha256) == prepared[1]


@pytest.mark.parametrize("place", ["local", "remote"])
def test_the_copy_of_the_tokenizer_must_be_the_manifest_s(data: DataConfig, tmp_path: Path, place: str) -> None:
    """A run takes it over, and its checkpoints are evaluated with it."""
    if place == "remote":
        data = dataclasses.replace(data, remote=data.local, local=str(tmp_path / "cache"))
    check_data(data, vocab_size=360, seq_len=SEQ_LEN)
    file = Path(data.remote or data.local) / "tokenizer" / "tokenizer.json"
    content = file.read_text()
    for edited, message in ((content + " ", "differs from the manifest's hash"), (None, "missing|can't be downloaded")):
        file.unlink() if edited is None else file.write_text(edited)
        with pytest.raises(UserError, match=rf"tokenizer/tokenizer\.json.*({message})"):
            check_data(data, vocab_size=360, seq_len=SEQ_LEN)


def test_hashes_of_an_earlier_version_are_compared_by_the_tokenizer(
    data: DataConfig, prepared: tuple[Path, Manifest]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(data.local) / "tokenizer")
    old = tokenizer_sha256(tokenizer, version=1)
    assert old != prepared[1].tokenizer.sha256
    check_data(data, vocab_size=360, seq_len=SEQ_LEN, tokenizer_sha256=old)
    tokenizer.add_tokens(["<another>"])
    other = tokenizer_sha256(tokenizer, version=1)
    with pytest.raises(UserError, match="made with another tokenizer"):
        check_data(data, vocab_size=360, seq_len=SEQ_LEN, tokenizer_sha256=other)


def test_bad_shards_are_named_before_the_first_step(data: DataConfig) -> None:
    shard = Path(data.local) / "cc" / "train" / "shard.00000.mds.zstd"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard\.00000\.mds\.zstd: its content differs"):
        check_data(data, vocab_size=360, seq_len=SEQ_LEN)
    check_data(dataclasses.replace(data, verify=False), vocab_size=360, seq_len=SEQ_LEN)
    check_data(dataclasses.replace(data, domains={"wiki": 1.0}), vocab_size=360, seq_len=SEQ_LEN)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="truncated"):
        check_data(dataclasses.replace(data, verify=False), vocab_size=360, seq_len=SEQ_LEN)


def test_the_plan_tells_of_repeats_and_absent_domains(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    data = dataclasses.replace(data, domains={**MIX, "book": 10.0}, optional_domains=["book"])
    plan = plan_mix(data, prepared[1], 2000)
    text = plan.render()
    assert plan.domains == ("cc", "notes", "wiki")
    assert plan.plans[0].proportion == pytest.approx(0.6)
    assert "absent from the data, so the other shares are renormalized: book" in text
    assert "cc: seen more than once" in text
    assert plan.plans[0].epochs == pytest.approx(1200 / prepared[1].samples("cc", "train"), rel=0.01)
    assert "seen more than once" not in plan_mix(data, prepared[1], 8).render()


def test_no_domains_means_all_by_size(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    plan = plan_mix(dataclasses.replace(data, domains={}), prepared[1], 100)
    sizes = {name: prepared[1].samples(name, "train") for name in MIX}
    assert {p.name: p.proportion for p in plan.plans} == pytest.approx(
        {n: s / sum(sizes.values()) for n, s in sizes.items()}
    )


def test_less_data_than_a_batch_is_repeated(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    notes = dataclasses.replace(data, domains={"notes": 1.0})
    size = 4 * manifest.samples("notes", "train")
    batches = list(loader(notes, manifest, global_batch_size=size, device_batch_size=size))
    assert [len(batch["domain"]) for batch in batches] == [size]
    assert len(np.unique(batches[0]["input_ids"].numpy(), axis=0)) == size // 4


def test_canonical_nodes_change_the_order_and_nothing_else(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    many = loader(dataclasses.replace(data, num_canonical_nodes=3), manifest)
    size = many.dataset.epoch_size
    assert size % 3 == 0
    domain = torch.cat([batch["domain"] for batch in many])
    assert torch.bincount(domain).tolist() == [p.samples for p in plan_mix(data, manifest, size).plans]


def test_batch_sizes_must_fit(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    with pytest.raises(UserError, match="global_train_batch_size=8 is not 1 process"):
        loader(data, prepared[1], device_batch_size=3)


def test_remote_data_comes_through_the_cache(data: DataConfig, prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    expected = list(loader(data, prepared[1]))
    cached = dataclasses.replace(data, remote=data.local, local=str(tmp_path / "cache"))
    manifest = check_data(cached, vocab_size=360, seq_len=SEQ_LEN)
    assert manifest == prepared[1]
    assert (tmp_path / "cache" / "tokenizer" / "tokenizer.json").is_file()
    assert same(list(loader(cached, manifest)), expected)
    val = build_eval_loaders(cached, manifest, device_batch_size=4)
    assert sum(len(batch["domain"]) for batch in val["cc"]) == manifest.samples("cc", "val")
    save_manifest(dataclasses.replace(manifest, notes=["other"]), Path(data.local))
    with pytest.raises(UserError, match="is the cache of other data"):
        check_data(cached, vocab_size=360, seq_len=SEQ_LEN)
    with pytest.raises(UserError, match="can't be downloaded"):
        check_data(
            dataclasses.replace(cached, remote=str(tmp_path / "nowhere"), download_retry=1), vocab_size=360, seq_len=32
        )


def test_a_corrupt_remote_shard_is_named(data: DataConfig, prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    shard = Path(data.local) / "cc" / "val" / "shard.00000.mds.zstd"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    cached = dataclasses.replace(data, remote=data.local, local=str(tmp_path / "cache"))
    manifest = check_data(cached, vocab_size=360, seq_len=SEQ_LEN)
    with pytest.raises(UserError, match=r"cc/val/shard\.00000\.mds\.zstd: its content differs"):
        list(build_eval_loaders(cached, manifest, device_batch_size=4)["cc"])


def run_until_killed(data: DataConfig, manifest: Manifest, running: Any) -> None:
    datasets._held = None  # as in a process of its own
    train = loader(data, manifest)
    train.dataset.load_state_dict(train.dataset.state_dict(BATCH, True))
    next(iter(train))
    running.send(True)
    time.sleep(100)


def test_runs_beside_each_other_and_after_killed_ones(data: DataConfig, prepared: tuple[Path, Manifest]) -> None:
    context = multiprocessing.get_context("fork")
    runs = []
    for _ in range(3):  # on the same data, at once
        here, there = context.Pipe()
        runs.append(context.Process(target=run_until_killed, args=(data, prepared[1], there)))
        runs[-1].start()
        assert here.poll(60), "a run did not start beside another"
    for run in runs:
        os.kill(run.pid or 0, signal.SIGKILL)
        run.join()
    assert len(list(loader(data, prepared[1]))) > 0


def test_shared_memory_is_cleaned_only_by_who_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[int] = []
    monkeypatch.setattr(datasets, "clean_stale_shared_memory", lambda: cleaned.append(1))
    monkeypatch.setattr(datasets, "lock_path", lambda: tmp_path / "lock")
    monkeypatch.setattr(datasets, "_held", None)
    datasets.claim_shared_memory()
    datasets.claim_shared_memory()
    assert cleaned == [1]
    first = datasets._held
    monkeypatch.setattr(datasets, "_held", None)
    datasets.claim_shared_memory()  # while the first is alive
    assert cleaned == [1]
    assert first is not None
    assert datasets._held is not None
    os.close(first)
    os.close(datasets._held)
    monkeypatch.setattr(datasets, "_held", None)
    datasets.claim_shared_memory()
    assert cleaned == [1, 1]
    os.close(datasets._held)
