"""What a run resumes from: its own newest checkpoint, here or on object storage, or that of ``load_path``.

On storage the link that names the newest checkpoint is written last, so what it names is complete.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from mohd_train.checkpoint.identity import check_tokenizer
from mohd_train.checkpoint.read import open_native, resolve
from mohd_train.checkpoint.save import remove
from mohd_train.config.compare import config_differences
from mohd_train.config.plan import ModelPlan
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import (
    LATEST,
    LATEST_LINK,
    METRICS,
    RECORD,
    checkpoint_batch,
    checkpoints_in,
    local_save_folder,
)
from mohd_train.run_folder.secrets import shown
from mohd_train.storage import Storage, download_checkpoint, is_remote


@dataclass(frozen=True)
class ResumePoint:
    """Where a session starts. An empty one starts from scratch.

    Attributes:
        checkpoint: what is loaded, on this node's disk: a copy if it is on object storage.
        source: its name in messages: its address on object storage, or its path.
        is_resuming: whether it is this run's own, and not ``load_path``'s.
        skipped: newer checkpoints that are broken, one line each.
        metrics: ``metrics.jsonl`` up to that checkpoint, downloaded; None if the run folder's own is right.
        stored_record: ``run.json`` of a remote ``save_folder`` that holds a run.
        scratch: the folder of the copies.
    """

    checkpoint: Path | None = None
    source: str = ""
    is_resuming: bool = False
    skipped: tuple[str, ...] = ()
    metrics: Path | None = None
    stored_record: dict[str, Any] | None = None
    scratch: Path | None = None

    def forget_copies(self) -> None:
        """Removes the copies once every process has loaded them: a run killed later would leave them forever.

        To be called by every process.
        """
        if self.scratch is not None:
            dist.barrier()
            if dist.get_local_rank() == 0:
                shutil.rmtree(self.scratch, ignore_errors=True)


def download(config: Config) -> ResumePoint:
    """What object storage has of this run, with a copy of the checkpoint to resume from; once per node.

    The copies are removed when their process ends. The checkpoint is None if a local one is as new.

    Raises:
        UserError: the storage can't be reached, a checkpoint is missing, or none is valid.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mohd_train-remote-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    found = ResumePoint(scratch=scratch)
    if is_remote(config.save_folder):
        found = _download_run(config, found, scratch)
    here = config.autoresume and _newest_batch_here(config) >= 0
    if found.checkpoint is None and not here and config.load_path and is_remote(config.load_path):
        return replace(found, source=config.load_path, checkpoint=download_checkpoint(config.load_path, scratch))
    return found


def choose(config: Config, downloaded: ResumePoint, *, has_trained: bool) -> ResumePoint:
    """The checkpoint to start from: downloaded, this run's newest valid one here, or ``load_path``'s.

    Args:
        downloaded: of :func:`download`, or the empty one.
        has_trained: whether an earlier session of this run has left a record.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    if downloaded.is_resuming:
        return downloaded
    if has_trained:
        newest, skipped = latest_valid(local_save_folder(config))
        if newest is not None:
            return replace(downloaded, checkpoint=newest, source=str(newest), is_resuming=True, skipped=tuple(skipped))
    if config.load_path:
        checkpoint = downloaded.checkpoint or resolve(Path(config.load_path))
        return replace(downloaded, checkpoint=checkpoint, source=config.load_path)
    return downloaded


def latest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, every byte verified, and a line for each newer one that is broken.

    Composer's ``latest`` link alone would not do: for a moment between two saves there is none, and a run killed then
    would silently start over.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints_in(folder).values()):
        try:
            open_native(path).verify()
        except UserError as error:
            skipped.append(str(error))
            continue
        return path, skipped
    if skipped:
        raise UserError(f"no checkpoint in {folder} is valid; {skipped[0]} (or save_overwrite=true to start over)")
    return None, []


def up_to(checkpoint: Path) -> list[str]:
    """``checkpoint`` and the older ones in its folder, oldest first: what keep-last-K counts."""
    found = list(checkpoints_in(checkpoint.parent).values())
    return [str(path) for path in found[: found.index(checkpoint) + 1]]


def point_latest(checkpoint: Path) -> None:
    """Lets Composer's autoresume find ``checkpoint``."""
    temporary = checkpoint.with_name(f".{LATEST}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    temporary.replace(checkpoint.with_name(LATEST))


def check_checkpoint(
    start: ResumePoint,
    config: Config,
    plan: ModelPlan,
    shapes: dict[str, torch.Size],
    tokenizer_sha256: str,
    tokenizer_folder: Path,
) -> None:
    """Refuses a checkpoint of another model, or of another run if this one resumes; the message names what differs.

    Args:
        start: with its checkpoint on local disk.
        plan: this run's model.
        shapes: its parameters, name -> shape.
        tokenizer_sha256: the tokenizer of this run's data, as its manifest names it.
        tokenizer_folder: where that is.

    Raises:
        UserError: another run, architecture or tokenizer; parameters missing, unexpected or of another shape; corrupt.
    """
    assert start.checkpoint is not None
    path, found = start.checkpoint, open_native(start.checkpoint)
    assert found.plan is not None, "a native checkpoint"
    if start.is_resuming:
        _check_owner(path, found.metadata, config)
    else:
        found.verify()  # one that a run resumes from was read when it was chosen
    weights, differences = found.tensors(meta=True), plan.differences(found.plan)
    if differences:
        raise UserError(
            f"{path} is of another architecture ({'; '.join(differences)}); give its own model and mohd config"
        )
    check_tokenizer(
        found.tokenizer_sha256,
        tokenizer_sha256,
        what=f"{path} was trained with another tokenizer than this data's",
        remedy="prepare the data with the checkpoint's",
        folder=tokenizer_folder,
    )
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unexpected:
        names = ", ".join(
            [f"{name} missing" for name in missing[:2]] + [f"{name} unexpected" for name in unexpected[:2]]
        )
        match = f"{len(shapes) - len(missing)} of {len(shapes)} match"
        raise UserError(f"{path} does not hold this model's parameters ({match}; {names})")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{path}: {name} is {list(weights[name].shape)} there, {list(shape)} here")


def _check_owner(path: Path, metadata: dict[str, Any], config: Config) -> None:
    """A checkpoint says which run wrote it: two runs that save to one folder must not resume from each other's."""
    differences = config_differences(metadata.get("config") or {}, dataclasses.asdict(shown(config)))
    if metadata.get("run_name") != config.run_name:
        differences.insert(0, f"run_name: {metadata.get('run_name')} there, {config.run_name} here")
    if differences:
        raise UserError(f"{path} was written by another run ({differences[0]}); give each run a save_folder of its own")


def _download_run(config: Config, found: ResumePoint, scratch: Path) -> ResumePoint:
    """The record and, if the run resumes, its newest valid checkpoint and the metrics up to there."""
    storage = Storage(config.save_folder)
    names = storage.names()
    if RECORD in names and not (config.save_overwrite and not config.autoresume):
        found = replace(found, stored_record=_record(storage))
    if not config.autoresume or found.stored_record is None or LATEST_LINK not in names:
        return found
    newest = storage.pointed(LATEST_LINK)
    there = {name.partition("/")[0] for name in names}
    batches = {batch: name for name in there if (batch := checkpoint_batch(name)) is not None}
    last = next((batch for batch, name in batches.items() if name == newest), None)
    if last is None or _newest_batch_here(config) >= last:
        return found
    skipped: list[str] = []
    for batch in sorted((batch for batch in batches if batch <= last), reverse=True):
        target, source = scratch / batches[batch], f"{storage.uri}/{batches[batch]}"
        storage.download_all(batches[batch], target, names)
        try:
            open_native(target).verify()
        except UserError as error:
            skipped.append(str(error).replace(str(target), source))
            remove(target)
            continue
        metrics = scratch / METRICS if storage.download(METRICS, scratch / METRICS) else None
        return replace(
            found, checkpoint=target, source=source, is_resuming=True, metrics=metrics, skipped=tuple(skipped)
        )
    raise UserError(f"no checkpoint in {storage.uri} is valid; {skipped[0]} (or save_overwrite=true to start over)")


def _newest_batch_here(config: Config) -> int:
    """Batch of the newest valid checkpoint on local disk, -1 without. With several nodes all take the storage's: only one
    has any."""
    if dist.get_world_size() > dist.get_local_world_size():
        return -1
    try:
        newest, _ = latest_valid(local_save_folder(config))
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
