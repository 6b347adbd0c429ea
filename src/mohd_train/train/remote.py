"""A run whose ``save_folder`` is on object storage: what is there, and downloading it to resume from it alone.

The link that names the newest checkpoint is written last, so what it names is whole.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer.utils import dist

from mohd_train.checkpoint import open_native
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import LATEST_LINK, METRICS, RECORD, checkpoint_batch, local_save_folder
from mohd_train.storage import Storage, bring_checkpoint, is_remote
from mohd_train.train.checkpoint import newest_whole
from mohd_train.train.saver import remove


@dataclass
class Brought:
    """What was brought from storage to this node.

    Attributes:
        record: ``run.json`` of the remote ``save_folder``, where it holds a run.
        source, checkpoint: the address of the checkpoint to go on from, and its copy; None where a local one is as new.
        goes_on: whether it is this run's own, and not ``load_path``'s.
        metrics: the lines up to that checkpoint.
        skipped: newer checkpoints that are broken, each with the reason.
        scratch: the folder of the copies.
    """

    record: dict[str, Any] | None = None
    source: str = ""
    checkpoint: Path | None = None
    goes_on: bool = False
    metrics: Path | None = None
    skipped: list[str] = field(default_factory=list)
    scratch: Path | None = None

    def clear(self) -> None:
        """Removes the copies once every process has loaded them: at the end would be too late for one that is killed.
        To be called by every process."""
        if self.scratch is not None:
            dist.barrier()
            if dist.get_local_rank() == 0:
                shutil.rmtree(self.scratch, ignore_errors=True)


def bring(config: Config) -> Brought:
    """What is on storage of the run, and the checkpoint to go on from, once a node. To be called by every process.

    The copies go when their process ends.

    Raises:
        UserError: the storage can't be reached, a checkpoint is missing, or none is whole.
    """
    found, error = Brought(), None
    if dist.get_local_rank() == 0:
        try:
            found = _bring(config)
        except UserError as problem:
            error = str(problem)
    everyone = dist.all_gather_object((dist.get_node_rank(), dist.get_local_rank(), found, error))
    first = next((text for *_, text in everyone if text), None)
    if first is not None:
        raise UserError(first)
    return next(it for node, rank, it, _ in everyone if node == dist.get_node_rank() and rank == 0)


def _bring(config: Config) -> Brought:
    scratch = Path(tempfile.mkdtemp(prefix="mohd_train-remote-"))
    found = Brought(scratch=scratch)
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if is_remote(config.save_folder):
        _bring_run(config, found, scratch)
    here = config.autoresume and _newest_here(config) >= 0
    if found.checkpoint is None and not here and config.load_path and is_remote(config.load_path):
        found.source, found.checkpoint = config.load_path, bring_checkpoint(config.load_path, scratch)
    return found


def _bring_run(config: Config, found: Brought, scratch: Path) -> None:
    """The record, and where the run goes on, its newest whole checkpoint and its metrics."""
    storage = Storage(config.save_folder)
    names = storage.names()
    if RECORD in names and not (config.save_overwrite and not config.autoresume):
        found.record = _record(storage)
    if not config.autoresume or found.record is None or LATEST_LINK not in names:
        return
    newest = storage.pointed(LATEST_LINK)
    there = {name.partition("/")[0] for name in names}
    batches = {batch: name for name in there if (batch := checkpoint_batch(name)) is not None}
    last = next((batch for batch, name in batches.items() if name == newest), None)
    if last is None or _newest_here(config) >= last:
        return
    for batch in sorted((batch for batch in batches if batch <= last), reverse=True):
        target = scratch / batches[batch]
        storage.download_all(batches[batch], target, names)
        try:
            open_native(target).tensors()
        except UserError as error:
            found.skipped.append(str(error).replace(str(target), f"{storage.uri}/{batches[batch]}"))
            remove(target)
            continue
        found.source, found.checkpoint, found.goes_on = f"{storage.uri}/{batches[batch]}", target, True
        found.metrics = scratch / METRICS if storage.download(METRICS, scratch / METRICS) else None
        return
    raise UserError(
        f"no checkpoint in {storage.uri} is whole; {found.skipped[0]} (or save_overwrite=true to start over)"
    )


def _newest_here(config: Config) -> int:
    """Batch of the newest whole checkpoint on this disk, -1 without. Several nodes all take the storage's: one alone has any."""
    if dist.get_world_size() > dist.get_local_world_size():
        return -1
    try:
        newest, _ = newest_whole(local_save_folder(config))
    except UserError:
        return -1
    batch = checkpoint_batch(newest.name) if newest is not None else None
    return -1 if batch is None else batch


def _record(storage: Storage) -> dict[str, Any]:
    try:
        data = json.loads(storage.text(RECORD) or "")
    except ValueError as error:
        raise UserError(f"{storage.uri}/{RECORD} is broken ({error}); set another save_folder") from None
    if not isinstance(data, dict) or not {"config", "status", "data", "sessions"} <= data.keys():
        raise UserError(f"{storage.uri}/{RECORD} is not the record of a run; set another save_folder")
    return data
