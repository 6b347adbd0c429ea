"""Claims a run's folder: the lock, the leftovers of a killed session, the record of this one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.utils import dist

from mohd_train.checkpoint.resume import point_latest
from mohd_train.checkpoint.save import leftovers, remove
from mohd_train.config.load import to_yaml
from mohd_train.data.manifest import TOKENIZER_FOLDER
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import (
    CONFIG,
    LATEST,
    LATEST_LINK,
    METRICS,
    OWNER,
    RECORD,
    TOKENIZER,
    local_save_folder,
)
from mohd_train.run_folder.record import RunRecord, read_record
from mohd_train.run_folder.secrets import shown
from mohd_train.storage import Storage, is_remote
from mohd_train.train import parallel
from mohd_train.train.callbacks.uploads import clear_staged
from mohd_train.utils.environment import code_version, hardware, now, versions
from mohd_train.utils.files import Lock, write_atomic, write_json

if TYPE_CHECKING:
    from mohd_train.train.train import Run


class RunLock:
    """Only one live run in each of the folders that it writes to.

    Args:
        folders: the run folder, and the one for checkpoints; a folder inside another one is covered by that one's lock.
    """

    def __init__(self, *folders: Path) -> None:
        whole = [folder.resolve() for folder in folders]
        self.folders = [
            folder
            for folder, path in zip(folders, whole, strict=True)
            if not any(other in path.parents for other in whole)
        ]
        self._locks: dict[Path, Lock] = {}

    def take_existing(self) -> None:
        """:meth:`take`, for the folders that exist."""
        self._take([folder for folder in self.folders if folder.is_dir()])

    def take(self) -> None:
        """Raises UserError if another live process holds one of them."""
        self._take(self.folders)

    def _take(self, folders: list[Path]) -> None:
        for folder in folders:
            if folder not in self._locks:
                busy = f"{folder} is in use by a live run ({{holder}}); stop it first, or set another run_name"
                self._locks[folder] = Lock(folder / ".lock", busy)

    def release(self) -> None:
        """Releases all locks."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()


def check_shared(folder: Path) -> None:
    """Makes sure that ``folder`` is the same folder on all nodes: a sharded checkpoint is one folder that all of them
    write.

    A file is put next to it for that moment. To be called by every process.

    Raises:
        UserError: on every rank, where a node does not see that file.
    """
    place, probe = folder.absolute(), f".mohd_train-{uuid.uuid4().hex}"
    levels = next(i for i, parent in enumerate((place, *place.parents)) if parent.is_dir())
    box = [(levels, probe)]
    dist.broadcast_object_list(box)
    levels, probe = box[0]
    path = (place, *place.parents)[levels] / probe
    try:
        if dist.get_global_rank() == 0:
            path.touch()
        dist.barrier()
        seen = dist.all_gather_object((dist.get_node_rank(), path.exists()))
    finally:
        if dist.get_global_rank() == 0:
            path.unlink(missing_ok=True)
    apart = sorted({node for node, same in seen if not same})
    if apart:
        raise UserError(
            f"{folder} on node {apart[0]} is not node 0's, and a sharded checkpoint is one folder; put run_folder and save_folder "
            "on a file system that the nodes share, or set fsdp_config.state_dict_type=full"
        )


def open_folder(run: Run, lock: RunLock) -> RunRecord:
    """Takes the run folder: the record of this session, a copy of the tokenizer, the config. Rank 0 alone.

    Raises:
        UserError: the folder can't be written, or a live run holds it.
    """
    config, folder = run.config, run.folder
    save_folder = local_save_folder(config)
    try:
        for path in (folder, save_folder):
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        lock.take()
        if run.previous_record is None and not config.save_overwrite and _taken_meanwhile(folder):
            raise UserError(f"{folder} was just taken by another run; set another run_name")
        _clear(save_folder, checkpoints=config.save_overwrite and run.previous_record is None)
        if run.start.checkpoint is not None and run.start.checkpoint.parent == save_folder:
            point_latest(run.start.checkpoint)
        if run.start.metrics is not None:
            shutil.copyfile(run.start.metrics, folder / METRICS)
        _copy_tokenizer(Path(config.data.local) / TOKENIZER_FOLDER, folder / TOKENIZER)
        if save_folder.parent.resolve() != folder.resolve():  # one per run, even if several save to sibling folders
            _copy_tokenizer(Path(config.data.local) / TOKENIZER_FOLDER, save_folder / TOKENIZER)
            write_json(save_folder / OWNER, {"run_folder": str(folder.resolve()), "run_name": config.run_name})
    except OSError as error:
        raise UserError(
            f"can't write to {error.filename or folder} ({error.strerror}); choose another run_folder"
        ) from error
    write_atomic(folder / CONFIG, to_yaml(shown(config)))
    record = _new_session(run)
    if is_remote(config.save_folder):
        _open_storage(run)
    return record


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copies atomically, replacing an older copy."""
    fresh, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, fresh)
    if target.exists():
        target.replace(old)
    fresh.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def _open_storage(run: Run) -> None:
    """Shows, before any training, that the remote ``save_folder`` can be written to. A new run takes it over."""
    storage = Storage(run.config.save_folder)
    if run.previous_record is None and LATEST_LINK in storage.names():
        storage.upload_bytes(LATEST_LINK, b"")  # names none: what lies there is another run's
    for path in sorted((run.folder / TOKENIZER).iterdir()):
        storage.upload(f"{TOKENIZER}/{path.name}", path)
    for name in (CONFIG, RECORD):
        storage.upload(name, run.folder / name)


def _taken_meanwhile(folder: Path) -> bool:
    """Whether a run came and went since the checks, which hold no lock on a folder that doesn't exist yet."""
    record = read_record(folder)
    return record is not None and record.data["status"] != "failed"


def _clear(folder: Path, *, checkpoints: bool) -> None:
    """Removes partial saves and, if a new run replaces an old one, its checkpoints: autoresume must never find them."""
    old = [*folder.glob("ep*-ba*"), folder / LATEST] if checkpoints else []
    for path in [*leftovers(folder), *old]:
        remove(path)
    clear_staged(folder)


def _new_session(run: Run) -> RunRecord:
    """``run.json`` with this session appended: each session records its code, versions and data."""
    config = run.config
    record = run.previous_record or RunRecord(
        run.folder, {"run_name": config.run_name, "started": now(), "sessions": []}
    )
    data = {"folder": config.data.local, "sha256": run.manifest.sha256()}
    session = {
        "id": uuid.uuid4().hex,
        "started": now(),
        "hardware": hardware(run.device, dist.get_world_size()),
        "kernels": parallel.resolve_kernels(config, run.plan, run.device),
        "loss": parallel.resolve_loss(config, run.device),
        "code": code_version(),
        "versions": versions(),
        "data": data,
        "from": run.start.source or None,
        "skipped": list(run.start.skipped),
    }
    warnings = list(record.data.get("warnings", []))
    for text in changes_between(record.data["sessions"][-1] if record.data["sessions"] else {}, session):
        print(f"warning: {text} since the last session", file=sys.stderr, flush=True)
        entry = {"time": now(), "batch": record.data.get("batch", 0), "kind": "changed", "text": text}
        warnings.append(entry)
    record.update(
        status="running",
        error=None,
        ended=None,
        seed=config.seed,
        config=dataclasses.asdict(shown(config)),
        plan=run.plan.to_dict(),
        parameters=run.counts.to_dict(),
        code=session["code"],
        versions=session["versions"],
        data=data | run.manifest.summary(),
        sessions=[*record.data["sessions"], session],
        batch=record.data.get("batch", 0),
        tokens=record.data.get("tokens", 0),
        **({"warnings": warnings} if warnings else {}),
    )
    return record


def changes_between(last: dict[str, Any], session: dict[str, Any]) -> list[str]:
    """What differs from the last session: ``["torch changed from 2.7.0 to 2.8.0", ...]``."""
    found = []
    was, now_is = last.get("code") or {}, session["code"]
    if was and was != now_is:
        names = [
            f"{str(code.get('commit'))[:10]}{' with changes' if code.get('dirty') else ''}" for code in (was, now_is)
        ]
        found.append(f"the code changed from {names[0]} to {names[1]}")
    for key in ("kernels", "loss"):
        if last.get(key, session[key]) != session[key]:
            found.append(f"{key} changed from {last[key]} to {session[key]}")
    versions_then = last.get("versions") or {}
    for package in sorted(versions_then.keys() | session["versions"].keys()) if versions_then else ():
        then, today = versions_then.get(package), session["versions"].get(package)
        if then != today:
            found.append(f"{package} changed from {then} to {today}")
    return found
