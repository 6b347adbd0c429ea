"""What a fault means for the user: one line that says what happened and what to do, in place of a traceback."""

from __future__ import annotations

import errno
import gc
import logging
import multiprocessing
import re
import sys
import traceback

from composer.core import State
from composer.utils import dist

from mohd_train.data.datasets import SHM, SHM_ADVICE, shared_memory_is_full
from mohd_train.errors import UserError, causes
from mohd_train.run_folder.record import RunRecord
from mohd_train.utils.environment import now
from mohd_train.utils.text import first_line

log = logging.getLogger(__name__)
KEPT = 50  # the latest notices, kept in run.json
PLACE = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.EFBIG)
MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator", re.IGNORECASE)
NESTED = re.compile(r"mohd_train\.errors\.UserError: ")  # as a data worker passes it on, after its traceback


class Notices:
    """Warnings of a run: in its log, on the terminal (rank 0) and in ``run.json``, the latest :data:`KEPT`."""

    def __init__(self, record: RunRecord | None) -> None:
        self.record = record

    def __call__(self, state: State, kind: str, text: str) -> None:
        """One warning of ``kind``, such as ``loss_spike``."""
        log.warning("%s: %s", kind, text)
        if dist.get_global_rank() != 0:
            return
        print(f"warning: {text}", file=sys.stderr, flush=True)
        if self.record is not None:
            entry = {"time": now(), "batch": state.timestamp.batch.value, "kind": kind, "text": text}
            try:
                self.record.update(warnings=[*self.record.data.get("warnings", []), entry][-KEPT:])
            except OSError as error:  # a warning must not end the run
                log.error("%s can't be written: %s", self.record.path, error.strerror)


def explain(
    error: BaseException, microbatch: int | float | str, newest: str | None, *, stalled: bool = False
) -> UserError | None:
    """The line for a fault that a user can act on; None for a bug, which keeps its traceback.

    Args:
        error: what ended the run.
        microbatch: samples per forward pass at that time.
        newest: the last complete checkpoint.
        stalled: whether the data workers were killed because they delivered nothing.
    """
    text = str(error)
    resume = f"the last complete checkpoint is {newest or 'none yet'}; resume with autoresume=true"
    if NESTED.search(text):
        return UserError(f"{NESTED.split(text)[-1].strip()} ({resume})")
    if isinstance(error, UserError):
        return error
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
    if "Bus error" in text or (full and shared_memory_is_full()):
        return UserError(f"{SHM} is full ({first_line(text)}); {SHM_ADVICE}; {resume}")
    if isinstance(error, MemoryError) or MEMORY.search(text):
        return UserError(_memory_advice(microbatch, resume))
    if stalled or "DataLoader timed out" in text:
        return UserError(
            "no batch came from the data workers within data.worker_timeout (a hanging disk or download, frozen processes?); "
            + resume
        )
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return UserError(
            f"a data worker died ({text.splitlines()[0]}): often the machine ran out of memory, where fewer data.num_workers help; "
            + resume
        )
    if isinstance(error, OSError) and error.errno in PLACE:
        return UserError(f"{error.filename or 'writing'}: {error.strerror}; make room or mend the folder; {resume}")
    return None


def end_workers(error: BaseException) -> None:
    """Ends data workers and the threads that fetch shards, so that this process can end too.

    The traceback holds the loader's iterator, and torch waits for its end: otherwise it takes the workers' end for another
    fault, and raises it at any point. A worker that is stopped or hangs in a read is killed.
    """
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
    gc.collect()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join(10)


def settle_workers(error: BaseException) -> None:
    """As :func:`end_workers`; torch's signal handler, which reports dead workers wherever the main thread is, must not
    end it."""
    for _ in range(3):
        try:
            return end_workers(error)
        except RuntimeError as again:
            log.info("data workers: %s", again)
            error = again


def _memory_advice(microbatch: int | float | str, resume: str) -> str:
    if isinstance(microbatch, int) and microbatch > 1:
        advice = f"set device_train_microbatch_size={microbatch // 2} (it is {microbatch}), or auto on a GPU"
    else:
        advice = "a microbatch of one sample does not fit: shard the model (fsdp_config), or recompute its activations"
    return f"out of memory; {advice}; {resume}"
