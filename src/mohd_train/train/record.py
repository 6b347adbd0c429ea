"""``run.json``: what a run is (config, plan, code, versions, data, hardware) and how far it came; whose a folder is."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mohd_train
from mohd_train.config.compare import config_differences
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.train.remote import local_save_folder
from mohd_train.train.secrets import shown

PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "numpy", "triton", "omegaconf")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def code_version() -> dict[str, Any]:
    """Version of the package; commit and whether the tree has changes, where it runs from a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": mohd_train.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str, processes: int) -> dict[str, Any]:
    """The devices of this session."""
    gpu = device == "gpu"
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "processes": processes,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
    }


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
        return self.folder / "run.json"

    @property
    def run_id(self) -> str:
        """W&B's id of the run: the same in all of its sessions, another for another run of the same name."""
        return hashlib.sha256(f"{self.data['run_name']}/{self.data['started']}".encode()).hexdigest()[:16]

    def update(self, **values: Any) -> None:
        """Sets top-level keys and writes the file."""
        self.data.update(values, updated=now())
        write_json(self.path, self.data)


def read_record(folder: Path) -> RunRecord | None:
    """The record of ``folder``, or None where it has none. Raises UserError for a broken one."""
    path = folder / "run.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken ({error}); remove the folder, or set another run_name") from None
    if not isinstance(data, dict) or "config" not in data or "status" not in data:
        raise UserError(f"{path}: not the record of a run; set another run_name or run_folder")
    return RunRecord(folder, data)


def _has_trained(record: RunRecord) -> bool:
    """False for a run that failed before its first batch: its folder is free, so that the mistake can be put right."""
    metrics = record.folder / "metrics.jsonl"
    return (
        record.data["status"] != "failed"
        or bool(record.data.get("batch"))
        or (metrics.exists() and metrics.stat().st_size > 0)
    )


def check_folder(config: Config, data_sha256: str, stored: dict[str, Any] | None = None) -> RunRecord | None:
    """Whether this run may use its folder. Returns the record to go on from, or None for a new run.

    Args:
        config: this run.
        data_sha256: its data.
        stored: the record in a remote ``save_folder``, judged in place of the local folder's.

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
        for place, pattern in ((folder, "metrics.jsonl"), (local_save_folder(config), "ep*-ba*")):
            if record is None and any(place.glob(pattern)):
                raise UserError(
                    f"{place} holds {pattern} of another run (there is no {folder}/run.json); set another run_name"
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
            "set autoresume=true to go on with it, save_overwrite=true to start over, or another run_name"
        )
    return record
