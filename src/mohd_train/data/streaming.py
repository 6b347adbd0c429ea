"""From a prepared folder, local or remote, to the batches of a run: checks first, then the mix, then the loaders.

A batch is `{"input_ids": int64 [B,T], "labels": int64 [B,T], "domain": int64 [B]}`. `labels` equals `input_ids` (the loss
shifts them); `domain` indexes `MixPlan.domains`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry
from torch.utils.data import DataLoader

from mohd_train.checkpoint.identity import check_tokenizer
from mohd_train.config.schema import DataConfig
from mohd_train.data.datasets import (
    ShardStream,
    TokenStreams,
    ValidationSet,
    check_shared_memory,
    claim_shared_memory,
    log_failures,
    outlive_signals,
)
from mohd_train.data.manifest import HASH, MANIFEST, TOKENIZER_FOLDER, Manifest, load_manifest
from mohd_train.data.mix import MixPlan, epoch_samples, mixture, plan_mix
from mohd_train.data.verify import index_problems, tokenizer_problems, verify
from mohd_train.errors import UserError
from mohd_train.storage import refuse_remote
from mohd_train.utils.files import Lock

__all__ = ["MixPlan", "build_eval_loaders", "build_train_loader", "check_data", "collate", "plan_mix"]

VOCAB_PADDING = 127  # a model's vocabulary may be the tokenizer's rounded up to a multiple of at most 128
DEFAULT_BLOCK = 1 << 18  # samples shuffled together
SMALL_ARRAYS = 1 << 18  # bytes of shared memory


def check_data(data: DataConfig, *, vocab_size: int, seq_len: int, tokenizer_sha256: str | None = None) -> Manifest:
    """Checks that this data can train this model. Every process calls it before the first step.

    The sizes of all shards are always compared with the manifest, and with `data.verify` their hashes too (once per
    machine, about a second per GB). With `data.remote`, so are those in the cache; others are checked as they arrive.

    Args:
        vocab_size, seq_len: the model's.
        tokenizer_sha256: of the tokenizer that the model was trained with so far, if it was.
    Raises:
        UserError: the folder doesn't exist, lacks a domain of the config, has another tokenizer, vocabulary or sequence
            length, a copy of the tokenizer that is not the manifest's, a domain without samples or a bad shard, or can't be
            written to, so that shards can't be unpacked.
    """
    refuse_remote(data.local, "data.local", "set data.remote to that address, and data.local to a folder for the cache")
    if data.remote:
        fetch_manifest(data.remote, Path(data.local), data.download_retry, data.download_timeout)
    folder = Path(data.local)
    manifest = load_manifest(folder)
    if manifest.seq_len != seq_len:
        raise UserError(
            f"{folder} has samples of {manifest.seq_len} tokens, the model takes max_seq_len={seq_len}; "
            f"set max_seq_len={manifest.seq_len}, or prepare the data with --seq-len {seq_len}"
        )
    tokenizer = manifest.tokenizer
    if problems := tokenizer_problems(folder, manifest):
        raise UserError(f"{problems[0]}; copy the folder {TOKENIZER_FOLDER} again, or prepare the data again")
    check_tokenizer(
        tokenizer_sha256,
        tokenizer.sha256,
        what=f"{folder} was made with another tokenizer ({tokenizer.name}) than the model",
        remedy="prepare the data with the model's tokenizer",
        folder=folder / TOKENIZER_FOLDER,
    )
    if not 0 <= vocab_size - tokenizer.vocab_size <= VOCAB_PADDING:
        raise UserError(
            f"{folder} was made with a tokenizer of {tokenizer.vocab_size} tokens ({tokenizer.name}), the model has "
            f"vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size}, or prepare the data with the model's"
        )
    domains, _ = mixture(data, manifest)
    if data.remote:
        fetch_indexes(data.remote, folder, manifest, domains, data.download_retry, data.download_timeout)
    _check_shards(folder, manifest, domains, data.verify, cache=data.remote is not None)
    return manifest


def build_train_loader(
    data: DataConfig, manifest: Manifest, *, global_batch_size: int, device_batch_size: int, seed: int
) -> DataLoader[Any]:
    """The endless mix as a loader whose epochs are windows of it (:func:`epoch_samples` long, in whole global batches).

    The order depends on data, mix and seed alone. Composer's checkpoints contain the position, through the dataset's
    `state_dict`, so a run resumes exactly, on any number of processes and workers that divides the global batch.

    With several processes, call it after the process group is up.

    Args:
        global_batch_size: samples per step over all processes.
        device_batch_size: samples per step in this process.
        seed: of the order, unless `data.shuffle_seed` is set.
    Raises:
        UserError: the batch sizes don't fit the number of processes, a domain has no samples, or /dev/shm is too small.
    """
    if device_batch_size * dist.get_world_size() != global_batch_size:
        raise UserError(
            f"global_train_batch_size={global_batch_size} is not {dist.get_world_size()} process(es) x {device_batch_size} "
            "samples; choose a multiple of the number of processes"
        )
    claim_shared_memory()
    domains, shares = mixture(data, manifest)
    epoch_size = epoch_samples(data, manifest, global_batch_size)
    # Streaming's sample ids, 8 bytes each; int64 ids and labels of the batches that workers prefetch; the rest is small.
    batches = 2 * data.num_workers * dist.get_local_world_size() * device_batch_size * manifest.seq_len * 16
    check_shared_memory(8 * epoch_size + batches + SMALL_ARRAYS)
    dataset = TokenStreams(
        {domain: _stream(data, domain, "train") for domain in domains},
        shares,
        epoch_size=epoch_size,
        batch_size=device_batch_size,
        shuffle=data.shuffle,
        seed=seed if data.shuffle_seed is None else data.shuffle_seed,
        block_size=data.shuffle_block_size or DEFAULT_BLOCK,
        identity=manifest.sha256(),
        vocab_size=manifest.tokenizer.vocab_size,
        num_canonical_nodes=data.num_canonical_nodes or 1,
        predownload=data.predownload,
    )
    return _loader(dataset, data, device_batch_size)


def build_eval_loaders(data: DataConfig, manifest: Manifest, *, device_batch_size: int) -> dict[str, DataLoader[Any]]:
    """A loader per domain of its validation samples, each once, in order. Domains without any are left out.

    With several processes the sampler pads the last batch with repeats, which Composer's evaluation removes again.
    """
    domains, _ = mixture(data, manifest)
    loaders = {}
    for index, domain in enumerate(domains):
        if manifest.samples(domain, "val"):
            dataset = ValidationSet(_stream(data, domain, "val"), index, manifest.tokenizer.vocab_size)
            sampler = dist.get_sampler(dataset, drop_last=False, shuffle=False)
            loaders[domain] = _loader(dataset, data, device_batch_size, sampler)
    return loaders


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """B samples {"tokens" [T], "domain"} as one batch."""
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    domain = torch.tensor([sample["domain"] for sample in samples], dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens.clone(), "domain": domain}


def _loader(dataset: Any, data: DataConfig, batch_size: int, sampler: Any = None) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=data.num_workers,
        collate_fn=collate,
        drop_last=False,
        timeout=data.worker_timeout if data.num_workers else 0,
        worker_init_fn=outlive_signals if data.num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _stream(data: DataConfig, domain: str, split: str) -> ShardStream:
    return ShardStream(
        remote=f"{data.remote.rstrip('/')}/{domain}/{split}" if data.remote else None,
        local=str(Path(data.local) / domain / split),
        download_retry=data.download_retry,
        download_timeout=data.download_timeout,
        validate_hash=HASH if data.verify else None,
        keep_zip=False,
    )


def _check_shards(folder: Path, manifest: Manifest, domains: Iterable[str], hashes: bool, *, cache: bool) -> None:
    """Raises UserError for a bad shard, or for a packed one in a folder that can't be written to."""
    if dist.get_local_rank() == 0:
        problems = verify(folder, domains, hashes=hashes, cache=cache)
        if problems and cache:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise UserError(f"{problems[0]}{more}; this is a cached copy: remove it, and it is downloaded again")
        if problems:
            more = f" (and {len(problems) - 1} more: mohd verify lists them)" if problems[1:] else ""
            raise UserError(f"{problems[0]}{more}; copy the shard again, or prepare the data again")
    for domain in domains:
        for name, split in manifest.domains[domain].items():
            place = folder / domain / name
            packed = [shard for shard in split.shards if not (place / shard.raw_file).exists()]
            if packed and not cache and not os.access(place, os.W_OK):
                raise UserError(
                    f"{place} can't be written to, and shards are unpacked where they are; set data.remote={folder} and "
                    f"data.local to a folder of your own (cached {MANIFEST} and shards go there)"
                )


def fetch_manifest(remote: str, local: Path, attempts: int, timeout: float) -> None:
    """Downloads the manifest and the tokenizer of `remote` to the cache `local`. Any number of processes may do so at once.

    Raises UserError if they can't be downloaded, or if `local` is the cache of other data.
    """
    local.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=local))
    try:
        _download(remote, MANIFEST, scratch, attempts, timeout)
        manifest = load_manifest(scratch)
        for name in manifest.tokenizer.files:
            _download(remote, f"{TOKENIZER_FOLDER}/{name}", scratch, attempts, timeout)
        # The lock covers the comparison and everything that it allows: two runs may fill a new cache at once.
        lock = Lock(local / ".lock", f"{local} is being filled by another run ({{holder}}); start again", wait=timeout)
        try:
            if (local / MANIFEST).exists() and load_manifest(local).sha256() != manifest.sha256():
                raise UserError(
                    f"data.local={local} is the cache of other data than data.remote={remote}; choose another folder"
                )
            (local / TOKENIZER_FOLDER).mkdir(exist_ok=True)
            for name in manifest.tokenizer.files:
                os.replace(scratch / TOKENIZER_FOLDER / name, local / TOKENIZER_FOLDER / name)
            os.replace(scratch / MANIFEST, local / MANIFEST)
        finally:
            lock.release()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch_indexes(
    remote: str, local: Path, manifest: Manifest, domains: Iterable[str], attempts: int, timeout: float
) -> None:
    """Downloads the domains' `index.json`, which streaming wouldn't check, and compares them with the manifest.

    Raises UserError if one can't be downloaded, or lists other shards.
    """
    for domain in domains:
        for name, split in manifest.domains[domain].items():
            place = local / domain / name
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place) as scratch:
                _download(f"{remote.rstrip('/')}/{domain}/{name}", "index.json", Path(scratch), attempts, timeout)
                problems = index_problems(Path(scratch), split, manifest.dtype, manifest.seq_len)
                if problems:
                    raise UserError(
                        f"data.remote: {remote}/{domain}/{name}/index.json{problems[0].partition('index.json')[2]}; copy the data "
                        "there again"
                    )
                os.replace(Path(scratch) / "index.json", place / "index.json")


def _download(remote: str, name: str, folder: Path, attempts: int, timeout: float) -> None:
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    downloader = log_failures(CloudDownloader.get(remote))
    source = f"{remote.rstrip('/')}/{name}"
    try:
        retry(num_attempts=max(1, attempts))(lambda: downloader.download(source, str(target), timeout))()
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(
            f"data.remote: {source} can't be downloaded ({type(error).__name__}: {error}); check address and access"
        ) from error
