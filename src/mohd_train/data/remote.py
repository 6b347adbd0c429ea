"""Prepared data on remote storage: the manifest and the tokenizer come at start, shards when they are needed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from streaming.base.storage import CloudDownloader
from streaming.base.util import retry

from mohd_train.data.manifest import MANIFEST, TOKENIZER_FOLDER, Manifest, load_manifest
from mohd_train.data.verify import index_problems
from mohd_train.errors import UserError

log = logging.getLogger(__name__)


def fetch_manifest(remote: str, local: Path, attempts: int, timeout: float) -> None:
    """Brings manifest and tokenizer of `remote` to the cache `local`. Any number of processes may do so at once.

    Raises UserError when it can't be had, or `local` is the cache of other data.
    """
    local.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=local))
    try:
        _download(remote, MANIFEST, scratch, attempts, timeout)
        manifest = load_manifest(scratch)
        if (local / MANIFEST).exists() and load_manifest(local).sha256() != manifest.sha256():
            raise UserError(
                f"data.local={local} is the cache of other data than data.remote={remote}; choose another folder"
            )
        (local / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        for name in manifest.tokenizer.files:
            _download(remote, f"{TOKENIZER_FOLDER}/{name}", scratch, attempts, timeout)
            os.replace(scratch / TOKENIZER_FOLDER / name, local / TOKENIZER_FOLDER / name)
        os.replace(scratch / MANIFEST, local / MANIFEST)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch_indexes(
    remote: str, local: Path, manifest: Manifest, domains: Iterable[str], attempts: int, timeout: float
) -> None:
    """Brings the domains' `index.json`, which streaming would take as they are, and compares them with the manifest.

    Raises UserError when one can't be had, or lists other shards.
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


def tell_failures(downloader: CloudDownloader) -> CloudDownloader:
    """The downloader, which logs each attempt that fails: streaming tries again without a word."""
    theirs = downloader.download

    def download(remote: str | None, local: str, timeout: float = 60) -> None:
        try:
            theirs(remote, local, timeout)
        except Exception as error:
            log.warning("downloading %s failed (%s: %s)", remote, type(error).__name__, str(error).split("\n")[0])
            raise

    downloader.download = download  # type: ignore[method-assign]
    return downloader


def _download(remote: str, name: str, folder: Path, attempts: int, timeout: float) -> None:
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    downloader = tell_failures(CloudDownloader.get(remote))
    source = f"{remote.rstrip('/')}/{name}"
    try:
        retry(num_attempts=max(1, attempts))(lambda: downloader.download(source, str(target), timeout))()
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(
            f"data.remote: {source} can't be had ({type(error).__name__}: {error}); check address and access"
        ) from error
