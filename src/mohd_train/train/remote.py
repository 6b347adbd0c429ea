"""Checkpoints on remote storage, through Composer's object stores: brought here first, so that they are checked like any other."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri, retry

from mohd_train.errors import UserError
from mohd_train.train.checkpoint import LATEST

ATTEMPTS = 4


def is_remote(path: str) -> bool:
    """Whether Composer would upload to ``path``."""
    return bool(parse_uri(path)[0])


def _fetch(uri: str, target: Path) -> bool:
    """Downloads an object; False where there is none. Raises UserError where the storage can't be reached."""
    store = maybe_create_object_store_from_uri(uri)
    assert store is not None
    name = parse_uri(uri)[2]
    target.parent.mkdir(parents=True, exist_ok=True)

    @retry(Exception, num_attempts=ATTEMPTS, initial_backoff=0.5)  # each storage has exceptions of its own
    def download() -> bool:
        try:
            store.download_object(name, str(target), overwrite=True)
        except FileNotFoundError:
            return False
        return True

    try:
        return download()
    except Exception as error:
        raise UserError(
            f"{uri} can't be had ({type(error).__name__}: {error}); check address, access and network"
        ) from error


def _newest_uri(save_folder: str, scratch: Path) -> str | None:
    """The checkpoint that ``latest`` points to; Composer uploads that link after the checkpoint itself, so it is whole."""
    link = scratch / "latest.symlink"
    if not _fetch(f"{save_folder.rstrip('/')}/{LATEST}.symlink", link):
        return None
    backend, bucket, _ = parse_uri(save_folder)
    return f"{backend}://{bucket}/{link.read_text(encoding='utf-8').strip()}"


def bring_checkpoint(load_path: str | None, save_folder: str | None) -> tuple[str, Path] | None:
    """The newest checkpoint of a remote ``save_folder``, else a remote ``load_path``, downloaded once a node.

    To be called by every process. The copy goes when its process ends.

    Returns:
        Where it is from and the copy, or None where there is neither.
    Raises:
        UserError: the storage can't be reached, or it has no such checkpoint.
    """
    found: tuple[str, Path] | None = None
    error: str | None = None
    if dist.get_local_rank() == 0:
        try:
            found = _bring(load_path, save_folder)
        except UserError as problem:
            error = str(problem)
    everyone = dist.all_gather_object((dist.get_node_rank(), found, error))
    first = next((text for _, _, text in everyone if text), None)
    if first is not None:
        raise UserError(first)
    return next((it for node, it, _ in everyone if it is not None and node == dist.get_node_rank()), None)


def _bring(load_path: str | None, save_folder: str | None) -> tuple[str, Path] | None:
    scratch = Path(tempfile.mkdtemp(prefix="mohd_train-checkpoint-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    uri = _newest_uri(save_folder, scratch) if save_folder is not None else None
    uri = uri or load_path
    if uri is None:
        return None
    target = scratch / Path(parse_uri(uri)[2]).name
    if not _fetch(uri, target):
        raise UserError(f"{uri}: no such checkpoint; check the address")
    return uri, target
