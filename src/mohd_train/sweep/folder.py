"""The folder of a launched sweep, and which of its runs may be started.

SWEEP/sweep.json          file, scale, data, overrides, every run (model, setting, label, seed, command line), launches
      configs/RUN.yaml    the whole config that RUN trains with: later edits of configs/ don't reach it
      logs/RUN.log        what it printed;  logs/RUN.exit  how its last start ended
      locks/RUN           held for as long as RUN trains on a machine that sees this file system; who holds it
      locks/.launch       held while a launch reads and rewrites sweep.json
      jobs/               files that were handed to a scheduler
      RUN/                its run folder (run_folder/paths.py)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mohd_train.config.compare import config_differences
from mohd_train.config.load import to_yaml
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import METRICS
from mohd_train.run_folder.record import read_record
from mohd_train.sweep.data import DataSource
from mohd_train.sweep.expand import Choice, SweepRun
from mohd_train.sweep.file import SweepFile
from mohd_train.utils.environment import now
from mohd_train.utils.files import Lock, write_atomic, write_json
from mohd_train.utils.processes import SharedLock
from mohd_train.utils.text import plain_name

RECORD = "sweep.json"
FORMAT = "mohd_train.sweep/1"
LAUNCH_WAIT = 120.0  # seconds: sbatch may take a while to answer another launch


class SweepFolder:
    """A sweep's folder; ``record`` is the content of ``sweep.json``, empty before the first launch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None
        self.record: dict[str, Any] = _read(path / RECORD)

    @property
    def exists(self) -> bool:
        """Whether a sweep was launched here."""
        return bool(self.record)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Every run that was ever part of it, by name: ``model``, ``setting``, ``label``, ``seed``, ``command``."""
        return {run["name"]: run for run in self.record.get("runs", [])}

    @property
    def source(self) -> DataSource:
        """The data it was launched with."""
        return DataSource(**self.record.get("data", {}))

    def config_path(self, name: str) -> Path:
        """The config that a run trains with."""
        return self.path / "configs" / f"{name}.yaml"

    def log_path(self, name: str) -> Path:
        """What a run printed."""
        return self.path / "logs" / f"{name}.log"

    def exit_path(self, name: str) -> Path:
        """Holds the exit code of a run's last start; not there while it trains, nor after a kill."""
        return self.path / "logs" / f"{name}.exit"

    def run_lock(self, name: str) -> SharedLock:
        """Held by whatever trains a run; its file says who that is (launch/worker.py)."""
        return SharedLock(self.path / "locks" / name)

    def run_record(self, name: str) -> dict[str, Any] | None:
        """The run's own ``run.json``; None if it has none, or one that :meth:`record_problem` reports."""
        try:
            record = read_record(self.path / name)
        except UserError:
            return None
        return record.data if record else None

    def record_problem(self, name: str) -> str | None:
        """Why a run's ``run.json`` can't be read, in one line. Other runs are not affected."""
        try:
            read_record(self.path / name)
        except UserError as error:
            return str(error)
        return None

    def config(self, name: str) -> dict[str, Any]:
        """The stored config. Raises UserError where it is not there."""
        try:
            return yaml.safe_load(self.config_path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            raise UserError(f"{self.config_path(name)} is missing or broken; launch the sweep again") from None

    def claim(self, sweep: SweepFile, choice: Choice, source: DataSource, runs: list[SweepRun]) -> None:
        """Takes the folder for these runs: writes their configs and the record.

        Raises:
            UserError: it is of another sweep or scale; a run that has begun has another config there; it can't be written.
        """
        with self.locked():
            self.refuse_other(sweep, choice, source)
            self._refuse_edited(runs)
            for folder in ("configs", "logs", "jobs"):
                (self.path / folder).mkdir(exist_ok=True)
            for run in runs:
                write_atomic(self.config_path(run.name), to_yaml(run.config))
            known = self.runs | {run.name: _entry(run) for run in runs}
            self.record = {
                "format": FORMAT,
                "name": sweep.name,
                "title": sweep.title,
                "file": str(sweep.path),
                "scale": choice.scale,
                "data": dataclasses.asdict(source),
                "overrides": list(choice.overrides),
                "started": self.record.get("started", now()),
                "launches": self.record.get("launches", []),
                "runs": list(known.values()),
            }
            self.save()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one launch at a time: rereads ``sweep.json``, and keeps other launches from changing it until the end. A lock that is
        already held is kept.

        Raises:
            UserError: another launch has held it for two minutes.
        """
        if self._lock is not None:
            yield
            return
        lock = self.path / "locks" / ".launch"
        lock.parent.mkdir(parents=True, exist_ok=True)
        busy = f"{self.path} is being launched by another command ({{holder}}); try again once it is done"
        self._lock = Lock(lock, busy, wait=LAUNCH_WAIT)
        try:
            self.record = _read(self.path / RECORD)
            yield
        finally:
            self._lock.release()
            self._lock = None

    def save(self) -> None:
        """Writes ``sweep.json``; only within :meth:`locked`, or another launch's entry would be lost."""
        assert self._lock is not None, "sweep.json is rewritten without its lock"
        write_json(self.path / RECORD, self.record)

    def add_launch(self, launcher: str, runs: list[str], **details: Any) -> dict[str, Any]:
        """Records that runs were handed to a launcher; ``details`` describe its jobs."""
        launch = {"launcher": launcher, "time": now(), "runs": runs, **details}
        with self.locked():
            self.record["launches"].append(launch)
            self.save()
        return launch

    def launch_of(self, name: str) -> dict[str, Any] | None:
        """The newest launch that a run was part of."""
        return next((one for one in reversed(self.record.get("launches", [])) if name in one["runs"]), None)

    def begun(self, name: str) -> bool:
        """Whether a run has trained, so that its config is fixed; also if its record can't be read."""
        if self.record_problem(name):
            return True
        record = self.run_record(name)
        metrics = self.path / name / METRICS
        failed_at_once = record is not None and record["status"] == "failed" and not record.get("batch")
        return record is not None and not (failed_at_once and not (metrics.exists() and metrics.stat().st_size))

    def finished(self, name: str) -> bool:
        """Whether a run has trained to its end."""
        record = self.run_record(name)
        return record is not None and record["status"] == "finished"

    def refuse_other(self, sweep: SweepFile, choice: Choice, source: DataSource) -> None:
        """Raises UserError where another sweep, or this one at another scale or on other data, was launched here."""
        if not self.exists:
            return
        there = self.record
        if there["name"] != sweep.name:
            raise UserError(f"{self.path} holds the sweep {there['name']}, not {sweep.name}; choose another --out")
        if there["scale"] != choice.scale:
            raise UserError(
                f"{self.path} was launched with --scale {there['scale']}, not {choice.scale}; choose another --out"
            )
        if self.source != source and any(self.begun(name) for name in self.runs):
            raise UserError(f"{self.path} was launched with other data ({_shown(self.source)}); choose another --out")

    def _refuse_edited(self, runs: list[SweepRun]) -> None:
        for run in runs:
            if not self.begun(run.name):
                continue
            differences = config_differences(self.config(run.name), dataclasses.asdict(run.config))
            if differences:
                more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
                raise UserError(
                    f"{self.path / run.name} was started with another config ({differences[0]}{more}); undo the edit, choose "
                    "another --out, or remove that folder"
                )


def _entry(run: SweepRun) -> dict[str, Any]:
    command = ["scripts/train.py", *run.files, *run.overrides]
    fields = ("name", "model", "setting", "label", "seed")
    return {key: getattr(run, key) for key in fields} | {"plan": run.plan.to_dict(), "command": command}


def _shown(source: DataSource) -> str:
    given = {"--data": source.folder, "--raw": source.raw, "--tokenizer": source.tokenizer}
    return " ".join(f"{flag} {value}" for flag, value in given.items() if value)


def _read(path: Path) -> dict[str, Any]:
    """The record of a sweep; empty before its first launch."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UserError(
            f"{path}: broken ({error}); restore it from a copy, or launch again with another --out"
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: not the record of a sweep that this program reads ({FORMAT})")
    for run in data.get("runs", []):
        plain_name(str(run.get("name", "")), f"{path}: the name of a run")  # used as a folder's name
    return data
