"""``run.json``: what a run is (config, plan, code, versions, data, hardware), its progress, and which run owns a folder."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mohd_train.config.compare import config_differences
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import METRICS, OWNER, RECORD, checkpoints_in, local_save_folder
from mohd_train.run_folder.secrets import shown
from mohd_train.utils.environment import now
from mohd_train.utils.files import write_json


def check_writable(folder: Path) -> None:
    """Raises UserError where ``folder`` can't be made or written to; writes nothing."""
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "no permission" if place.is_dir() else "not a folder"
        raise UserError(f"can't write to {folder} ({place}: {reason}); choose another run_folder")


class RunRecord:
    """The record of one run folder. Only rank 0 may write it.

    Attributes:
        folder: the run folder.
        data: the content of ``run.json``.
    """

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder = folder
        self.data = data

    @property
    def path(self) -> Path:
        """``run.json``."""
        return self.folder / RECORD

    @property
    def run_id(self) -> str:
        """W&B's id of the run: the same in all of its sessions, different for another run of the same name."""
        return hashlib.sha256(f"{self.data['run_name']}/{self.data['started']}".encode()).hexdigest()[:16]

    def update(self, **values: Any) -> None:
        """Sets top-level keys and writes the file. Raises FileNotFoundError if the folder was removed: it isn't made again."""
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))
        self.data.update(values, updated=now())
        write_json(self.path, self.data)


def read_record(folder: Path) -> RunRecord | None:
    """The record of ``folder``, or None where it has none. Raises UserError for a broken one."""
    path = folder / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: broken ({error}); move it away, and start another run_name with load_path=CHECKPOINT"
        ) from None
    if not isinstance(data, dict) or "config" not in data or "status" not in data:
        raise UserError(f"{path}: not the record of a run; set another run_name or run_folder")
    return RunRecord(folder, data)


def _has_trained(record: RunRecord) -> bool:
    """False for a run that failed before its first batch: its folder is free, so that the mistake can be corrected."""
    metrics = record.folder / METRICS
    return (
        record.data["status"] != "failed"
        or bool(record.data.get("batch"))
        or (metrics.exists() and metrics.stat().st_size > 0)
    )


def check_save_folder(config: Config) -> None:
    """Raises UserError if ``save_folder``, outside the run folder, belongs to another run."""
    folder = local_save_folder(config)
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        place, name = Path(owner["run_folder"]), owner["run_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # none, or an unreadable one: the checkpoints name their run
    if name != config.run_name and place != Path(config.run_folder).resolve():
        raise UserError(
            f"save_folder {folder} belongs to the run {name} in {place}; give each run a save_folder of its own"
        )


def check_folder(config: Config, data_sha256: str, stored: dict[str, Any] | None = None) -> RunRecord | None:
    """Checks that this run may use its folder. Returns the record to continue, or None for a new run.

    Args:
        config: this run.
        data_sha256: its data.
        stored: the record in a remote ``save_folder``, used in place of the local folder's.

    Raises:
        UserError: the folder holds another run, or this one while neither autoresume nor save_overwrite is set.
    """
    folder = Path(config.run_folder)
    record = read_record(folder) if stored is None else RunRecord(folder, stored)
    where = folder if stored is None else config.save_folder
    if config.save_overwrite and not config.autoresume:
        if config.load_path and Path(config.save_folder).resolve() in Path(config.load_path).resolve().parents:
            raise UserError(
                f"load_path {config.load_path} lies in save_folder, which save_overwrite=true empties; set another run_name"
            )
        return None
    if record is None or not _has_trained(record):
        saved = local_save_folder(config)
        for place, what, there in (
            (folder, METRICS, (folder / METRICS).exists()),
            (saved, "ep*-ba*", bool(checkpoints_in(saved))),
        ):
            if record is None and there:
                raise UserError(
                    f"{place} holds {what} of another run (there is no {folder}/{RECORD}); set another run_name"
                )
        return None
    differences = config_differences(record.data["config"], dataclasses.asdict(shown(config)))
    if record.data["data"]["sha256"] != data_sha256:
        differences.append(
            f"data: {record.data['data']['folder']} there has other shards than {config.data.local} here"
        )
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise UserError(
            f"{where} holds another run ({differences[0]}{more}); set another run_name, or save_overwrite=true to replace it"
        )
    if not config.autoresume:
        raise UserError(
            f"{where} already holds this run ({record.data['status']}, at batch {record.data.get('batch', 0)}); "
            "set autoresume=true to resume it, save_overwrite=true to start over, or another run_name"
        )
    return record
