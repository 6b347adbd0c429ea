"""Keeps ``run.json`` up to date while a run trains."""

from __future__ import annotations

import logging

from composer.core import Callback, State
from composer.loggers import Logger

from mohd_train.checkpoint.save import CheckpointSaver
from mohd_train.run_folder.record import RunRecord
from mohd_train.train.callbacks.metrics_file import MetricsFile
from mohd_train.utils.environment import now

log = logging.getLogger(__name__)


class RunRecorder(Callback):
    """Writes the batch, the tokens and the newest checkpoint at each checkpoint, and the final metrics at the end.

    It must come after Composer's CheckpointSaver in ``state.callbacks`` to see the checkpoint of its own batch.

    Args:
        record: the run's record, on rank 0; None elsewhere.
        saver: Composer's saver.
        metrics: the file log, whose last line is the final one.
    """

    def __init__(self, record: RunRecord | None, saver: CheckpointSaver, metrics: MetricsFile) -> None:
        self.record, self.saver, self.metrics = record, saver, metrics

    def _progress(self, state: State) -> dict[str, object]:
        latest = self.saver.newest
        found = {"batch": state.timestamp.batch.value, "tokens": state.timestamp.token.value}
        return found | ({"checkpoint": latest} if latest else {})

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After a checkpoint of this batch."""
        if self.record is not None and self.saver.last_checkpoint_batch == state.timestamp.batch:
            try:
                self.record.update(**self._progress(state))
            except OSError as error:  # the checkpoint is saved, and the next one writes the record again
                log.error("%s can't be written: %s", self.record.path, error.strerror)

    def finish(self, state: State, *, steps: int) -> None:
        """After the last validation: ``finished``, or ``stopped`` if a callback ended the run before its ``steps``."""
        if self.record is not None:
            final = {name: value for name, value in self.metrics.latest.items() if not name.startswith("routing/")}
            status = "finished" if state.timestamp.batch.value >= steps else "stopped"
            self.record.update(status=status, ended=now(), metrics=final, **self._progress(state))
