"""Uploads checkpoints and records to object storage while training continues."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from mohd_train.checkpoint.resume import latest_valid
from mohd_train.checkpoint.save import CheckpointSaver, checkpoint_of, remove
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import LATEST_LINK, METRICS, RECORD, local_save_folder
from mohd_train.storage import Storage, is_remote

log = logging.getLogger(__name__)
STAGED = ".upload-"


class TakenOver(UserError):
    """Another session of the run writes to its ``save_folder`` now."""


class Uploads(Callback):
    """Uploads each checkpoint, then ``metrics.jsonl`` and ``run.json``, then the link that makes it the newest, in that
    order.

    Training continues meanwhile, also when the storage fails for longer than the attempts of
    :mod:`mohd_train.storage`: the checkpoint is on the local disk, a warning says so, and the next checkpoint retries
    the upload. The run succeeds only if its last checkpoint has arrived. It must come after the saver and the recorder in
    ``state.callbacks``. Rank 0 alone; of a sharded checkpoint it uploads what every rank has written to the run folder.

    If another machine has resumed the run meanwhile, as after a preemption that this one survived, nothing more
    is uploaded, and this session stops.

    Args:
        storage: the remote ``save_folder``.
        folder: the run folder.
        saver: the run's saver, which writes to a local folder.
        notice: where warnings go.
    """

    def __init__(
        self, storage: Storage, folder: Path, saver: CheckpointSaver, notice: Callable[[State, str, str], None]
    ) -> None:
        self.storage, self.folder, self.saver, self.notice = storage, folder, saver, notice
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._futures: list[tuple[str, Future[None]]] = []
        self._queued: str | None = None  # the newest checkpoint that is stored or being uploaded
        self._session = session_of((folder / RECORD).read_text(encoding="utf-8"))
        self._taken_over: TakenOver | None = None

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After a checkpoint of this batch and its record."""
        if self.saver.last_checkpoint_batch == state.timestamp.batch:
            self._submit_newest()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Reports what failed.

        Raises:
            TakenOver: another session goes on with this run.
        """
        problems = self._collect(wait=False)
        if self._taken_over is not None:
            raise self._taken_over
        for text in problems:
            self.notice(state, "upload", f"{text}; training continues, and the next checkpoint will be uploaded")

    def finish(self) -> None:
        """Waits until the newest checkpoint, the metrics and the record as it is now are stored.

        Raises:
            UserError: they can't be; the line names the checkpoint on the local disk.
            TakenOver: another session goes on with this run.
        """
        self._collect(wait=True)
        self._submit_newest()  # retry what failed
        problems = self._collect(wait=True)
        if not problems:  # else the storage would call a run finished whose last checkpoint it lacks
            self._submit("the run's records", self._upload_records)
            problems = self._collect(wait=True)
        self._pool.shutdown(wait=True)
        if self._taken_over is not None:
            raise self._taken_over
        if problems:
            raise UserError(
                f"{problems[0]}; the run's files are complete in {self.folder}: mend the storage and start the run again with "
                "autoresume=true, or copy them"
            )

    def _submit_newest(self) -> None:
        """Queues the newest checkpoint of this session. A hard link to it (or a copy) outlives its removal by
        keep-last-K."""
        saved = self.saver.saved_checkpoints
        if not saved or saved[-1] == self._queued or not Path(saved[-1]).exists():
            return
        path = checkpoint_of(saved[-1])
        staged, metrics = (path.with_name(STAGED + name) for name in (path.name, f"{METRICS}.{path.stem}"))
        remove(staged)
        if path.is_dir():
            shutil.copytree(path, staged, copy_function=_hard_link)
        else:
            _hard_link(path, staged)
        shutil.copyfile(self.folder / METRICS, metrics)
        record = (self.folder / RECORD).read_bytes()
        self._queued = saved[-1]
        self._submit(path.name, lambda: self._upload(path.name, staged, metrics, record))

    def _submit(self, name: str, work: Callable[[], None]) -> None:
        self._futures.append((name, self._pool.submit(work)))

    def _upload(self, name: str, staged: Path, metrics: Path, record: bytes) -> None:
        try:
            self._check_ours()
            self.storage.upload(name, staged)
            self.storage.upload(METRICS, metrics)
            self.storage.upload_bytes(RECORD, record)
            self.storage.upload_bytes(LATEST_LINK, self.storage.key(name).encode())
            log.info("uploaded %s/%s", self.storage.uri, name)
        finally:
            with contextlib.suppress(OSError):
                remove(staged)
                remove(metrics)

    def _check_ours(self) -> None:
        """Raises TakenOver where the storage's record is another session's. Of two, one goes on: who stops uploads no
        more."""
        text = self.storage.text(RECORD)
        theirs = self._session if text is None else session_of(text)
        if theirs != self._session:
            self._taken_over = TakenOver(
                f"{self.storage.uri} now belongs to another session of this run, started {theirs.get('started')}; this one "
                f"stops, and what it has trained since its last upload remains in {self.folder} only"
            )
            raise self._taken_over

    def _upload_records(self) -> None:
        self._check_ours()
        for name in (METRICS, RECORD):
            if (self.folder / name).exists():
                self.storage.upload(name, self.folder / name)

    def _collect(self, *, wait: bool) -> list[str]:
        """What went wrong with the uploads that are done by now; of all of them with ``wait``."""
        open_ones, problems = [], []
        for name, future in self._futures:
            if not wait and not future.done():
                open_ones.append((name, future))
                continue
            error = future.exception()
            if error is not None:
                problems.append(str(error) if isinstance(error, UserError) else f"uploading {name} failed ({error})")
                log.warning("%s", problems[-1])
                if self._queued is not None and checkpoint_of(self._queued).name == name:
                    self._queued = None
        self._futures = open_ones
        return problems


def session_of(record: str) -> dict[str, Any]:
    """When and by which name the last session of a ``run.json`` began; empty where that can't be said."""
    try:
        last = json.loads(record)["sessions"][-1]
        return {key: last[key] for key in ("id", "started")}
    except (ValueError, LookupError, TypeError):
        return {}


def _hard_link(path: str | Path, other: str | Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)


def complete(config: Config, stored_record: dict[str, Any] | None) -> None:
    """Uploads the end of a finished run that is on this disk alone, since the storage failed when the run ended."""
    if not is_remote(config.save_folder) or (stored_record or {}).get("status") == "finished":
        return
    folder, storage = Path(config.run_folder), Storage(config.save_folder)
    newest, _ = latest_valid(local_save_folder(config))
    if newest is not None:
        storage.upload(newest.name, newest)
        storage.upload_bytes(LATEST_LINK, storage.key(newest.name).encode())
    for name in (METRICS, RECORD):
        storage.upload(name, folder / name)


def clear_staged(folder: Path) -> None:
    """Removes the partial uploads of a killed run."""
    for path in folder.glob(f"{STAGED}*"):
        remove(path)
