"""Copies of checkpoints and records on object storage, made beside the training."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.storage import Storage, is_remote
from mohd_train.train.checkpoint import newest_whole
from mohd_train.train.remote import LINK, METRICS, RECORD, Brought, local_save_folder
from mohd_train.train.saver import CheckpointSaver

log = logging.getLogger(__name__)
STAGED = ".upload-"


class Uploads(Callback):
    """Uploads each checkpoint, then ``metrics.jsonl`` and ``run.json``, then the link that makes it the newest, in this order.

    Training goes on meanwhile, and also where the storage fails for longer than the attempts of :mod:`mohd_train.storage`: the
    checkpoint is on the local disk, a warning says so, and the next checkpoint tries anew. The run only ends well if its last
    checkpoint has arrived. It must stand after the saver and the recorder in ``state.callbacks``. Rank 0 alone.

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
        self._queued: str | None = None  # the newest checkpoint that is stored or on its way

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After a checkpoint of this batch and its record."""
        if self.saver.last_checkpoint_batch == state.timestamp.batch:
            self._submit_newest()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Says what failed."""
        for text in self._collect(wait=False):
            self.notice(state, "upload", f"{text}; training goes on, and the next checkpoint will be uploaded")

    def finish(self) -> None:
        """Waits until the newest checkpoint, the metrics and the record as it is now are stored.

        Raises:
            UserError: they can't be; the line names the checkpoint on the local disk.
        """
        self._collect(wait=True)
        self._submit_newest()  # again, where it failed
        problems = self._collect(wait=True)
        if not problems:  # else the storage would call a run finished whose last checkpoint it lacks
            self._submit("the run's records", self._upload_records)
            problems = self._collect(wait=True)
        self._pool.shutdown(wait=True)
        if problems:
            raise UserError(
                f"{problems[0]}; the run's files are whole in {self.folder}: mend the storage and start the run again with "
                "autoresume=true, or copy them"
            )

    def _submit_newest(self) -> None:
        """Queues the newest checkpoint of this session. A second name for it (or a copy) outlives its removal by keep-last-K."""
        saved = self.saver.saved_checkpoints
        if not saved or saved[-1] == self._queued or not Path(saved[-1]).exists():
            return
        path = Path(saved[-1])
        staged, metrics = (path.with_name(STAGED + name) for name in (path.name, f"{METRICS}.{path.stem}"))
        staged.unlink(missing_ok=True)
        try:
            os.link(path, staged)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, staged)
        shutil.copyfile(self.folder / METRICS, metrics)
        record = (self.folder / RECORD).read_bytes()
        self._queued = saved[-1]
        self._submit(path.name, lambda: self._upload(path.name, staged, metrics, record))

    def _submit(self, name: str, work: Callable[[], None]) -> None:
        self._futures.append((name, self._pool.submit(work)))

    def _upload(self, name: str, staged: Path, metrics: Path, record: bytes) -> None:
        try:
            self.storage.upload(name, staged)
            self.storage.upload(METRICS, metrics)
            self.storage.upload_bytes(RECORD, record)
            self.storage.upload_bytes(LINK, self.storage.key(name).encode())
            log.info("uploaded %s/%s", self.storage.uri, name)
        finally:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
                metrics.unlink(missing_ok=True)

    def _upload_records(self) -> None:
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
                if self._queued is not None and Path(self._queued).name == name:
                    self._queued = None
        self._futures = open_ones
        return problems


def complete(config: Config, brought: Brought) -> None:
    """Uploads the end of a finished run that is on this disk alone, since the storage failed when the run ended."""
    if not is_remote(config.save_folder) or (brought.record or {}).get("status") == "finished":
        return
    folder, storage = Path(config.run_folder), Storage(config.save_folder)
    newest, _ = newest_whole(local_save_folder(config))
    if newest is not None:
        storage.upload(newest.name, newest)
        storage.upload_bytes(LINK, storage.key(newest.name).encode())
    for name in (METRICS, RECORD):
        storage.upload(name, folder / name)


def clear_staged(folder: Path) -> None:
    """Removes what a killed run left of its uploads."""
    for path in folder.glob(f"{STAGED}*"):
        path.unlink(missing_ok=True)
