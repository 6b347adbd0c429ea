"""Worker processes of a preparation. They share the parent's tokenizer, end with the parent, and queue little work."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from mohd_train.data.tokenizer import Tokenizer
from mohd_train.errors import UserError

J = TypeVar("J")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AHEAD = 2  # jobs queued beyond one per worker, which bounds the memory of text read ahead
_tokenizer: Tokenizer | None = None  # set before the workers are forked, so that none has to load its own


class WorkerPool:
    """`with WorkerPool(4, tokenizer) as pool: for job, result in pool.run(function, jobs): ...`"""

    def __init__(self, workers: int, tokenizer: Tokenizer) -> None:
        self._workers = workers
        self._tokenizer = tokenizer

    def __enter__(self) -> WorkerPool:
        global _tokenizer
        _tokenizer = self._tokenizer
        self._executor = ProcessPoolExecutor(
            self._workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[tuple[J, R]]:
        """(job, result) in order of completion. A job is taken from `jobs` only when a worker is about to be free.

        Raises whatever a job raises, and UserError if a worker dies.
        """
        running: dict[Future[R], J] = {}
        try:
            for job in jobs:
                running[self._executor.submit(function, job)] = job
                if len(running) >= self._workers + _AHEAD:
                    yield from self._finished(running)
            while running:
                yield from self._finished(running)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, perhaps out of memory; run the same command again with fewer --workers: it resumes"
            ) from error

    @staticmethod
    def _finished(running: dict[Future[R], J]) -> Iterator[tuple[J, R]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            yield job, future.result()


def worker_tokenizer() -> Tokenizer:
    """In a worker: the pool's tokenizer."""
    assert _tokenizer is not None
    return _tokenizer


def _start_worker(parent: int) -> None:
    if (
        sys.platform == "linux"
    ):  # at once: by the time a killed preparation's lock is free, none of its workers is writing
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Otherwise the workers of a killed parent would wait forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
