"""The local launcher: one run after another, or N at once, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mohd_train.errors import UserError, raise_on_interrupt
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.status import duration, last_error, render, run_status
from mohd_train.sweep.worker import Worker, threads

POLL = 0.5
REFRESH = 3.0


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; empty without any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [word.strip() for word in given.split(",") if word.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def slots(processes: int, parallel: int, on_cpu: bool, *, share_gpus: bool = False) -> list[dict[str, str]]:
    """The environment of each of the ``parallel`` places where a run can train: its own GPUs, its share of the cores.

    Args:
        share_gpus: runs of one process may share a GPU, dealt out in turn: small models don't fill one.

    Raises:
        UserError: fewer GPUs than ``processes * parallel``, where they aren't shared.
    """
    gpus = [] if on_cpu else visible_gpus()
    cores = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads(processes * parallel)}
    if not gpus:
        return [dict(cores) for _ in range(parallel)]
    if share_gpus and processes == 1 and parallel > len(gpus):
        return [cores | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(parallel)]
    if processes * parallel > len(gpus):
        raise UserError(
            f"{parallel} run(s) at once on {processes} GPU(s) each need {processes * parallel}, and there are {len(gpus)}; "
            "lower --processes or --parallel"
        )
    groups = [gpus[i * processes : (i + 1) * processes] for i in range(parallel)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A polite kill ends the launcher as Ctrl-C does: with its runs stopped and recorded."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    raise_on_interrupt()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LocalLauncher:
    """Trains runs on this machine and shows how they come on.

    Args:
        folder: the claimed sweep folder.
        processes: of each run.
        parallel: runs at once.
        on_cpu: leave GPUs alone.
        share_gpus: as in :func:`slots`.
    """

    def __init__(
        self, folder: SweepFolder, *, processes: int, parallel: int, on_cpu: bool = False, share_gpus: bool = False
    ) -> None:
        self.folder, self.processes = folder, processes
        self.free = slots(processes, parallel, on_cpu, share_gpus=share_gpus)
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._at_work: list[tuple[Worker, dict[str, str]]] = []
        self._failed: list[str] = []
        self._done = 0

    def run(self, names: list[str], shown: list[str]) -> int:
        """Trains ``names``, ``parallel`` at a time; a failure does not stop the others. Returns 1 if any failed.

        Args:
            shown: every run of the table on a terminal, the finished ones too.
        """
        todo, total = list(names), len(names)
        self.folder.add_launch("local", names, processes=self.processes, parallel=len(self.free))
        with _terminated_as_interrupted(), self._display(shown) as refresh:
            try:
                while todo or self._at_work:
                    while todo and self.free:
                        self._start(todo.pop(0), total)
                    time.sleep(POLL)
                    self._collect()
                    refresh()
            except KeyboardInterrupt:
                self._stop()
                raise
        for name in self._failed:
            self.console.print(f"failed: {name}: {last_error(self.folder.log_path(name))}", markup=False)
        return 1 if self._failed else 0

    def _start(self, name: str, total: int) -> None:
        environment = self.free.pop(0)
        try:
            worker = Worker(self.folder, name, self.processes, environment)
        except UserError as error:  # another launcher took it since
            self.free.append(environment)
            self._say(str(error))
            return
        self._done += 1
        self._at_work.append((worker, environment))
        self._say(f"[{self._done}/{total}] {name} started · {self.folder.log_path(name)}")

    def _collect(self) -> None:
        for worker, environment in list(self._at_work):
            code = worker.poll()
            if code is None:
                continue
            self._at_work.remove((worker, environment))
            self.free.append(environment)
            took = duration(time.monotonic() - worker.began)
            if code == 0 and self.folder.finished(worker.name):
                status = run_status(self.folder, worker.name)
                perplexity = f", validation perplexity {status.perplexity:.4g}" if status.perplexity else ""
                self._say(f"{worker.name} finished in {took}{perplexity}")
            else:
                self._failed.append(worker.name)
                self._say(f"{worker.name} failed after {took} (exit code {code}); the others go on")

    def _stop(self) -> None:
        self._say("stopping; `resume` goes on from the last checkpoints")
        for worker, _ in self._at_work:
            worker.stop()
        for worker, _ in self._at_work:
            worker.finish()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def _display(self, shown: list[str]) -> Iterator[Callable[[], None]]:
        """Yields what redraws the table: on a terminal only; elsewhere the plain lines are all."""
        if not self.console.is_terminal:
            yield lambda: None
            return
        last = 0.0

        def table() -> Table:
            return render(self.folder.record["name"], [run_status(self.folder, name) for name in shown])

        with Live(table(), console=self.console, auto_refresh=False) as live:

            def refresh() -> None:
                nonlocal last
                if time.monotonic() - last > REFRESH:
                    last = time.monotonic()
                    live.update(table(), refresh=True)

            yield refresh
            live.update(table(), refresh=True)
