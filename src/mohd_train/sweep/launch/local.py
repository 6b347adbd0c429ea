"""The local launcher: one run after another, or N at once, on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mohd_train.errors import UserError
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch.worker import orphans, run_job, threads
from mohd_train.sweep.status import last_error, render, run_status
from mohd_train.utils.processes import Command, Every, Job, Slot, Supervisor
from mohd_train.utils.text import duration

REFRESH = 3.0  # seconds between redraws of the table
LINE = 300.0  # seconds between two lines without a terminal


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
    """The environment of each of the ``parallel`` slots in which a run can train: its own GPUs, its share of the cores.

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


class LocalLauncher:
    """Trains runs on this machine and shows their progress.

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
        self.slots = slots(processes, parallel, on_cpu, share_gpus=share_gpus)
        self.console = Console(highlight=False, soft_wrap=True)
        self.orphans = orphans(folder)
        self._started, self._failed, self._stopping = 0, list[str](), False

    def run(self, names: list[str], shown: list[str]) -> int:
        """Trains ``names``, ``parallel`` at a time; a failure does not stop the others. Returns 1 if any failed.

        Runs that a killed launcher left running here occupy their slots until they end; this waits for them.

        Args:
            shown: every run of the table on a terminal, the finished ones too.
        """
        if names:
            self.folder.add_launch("local", names, processes=self.processes, parallel=len(self.slots))
        for name, found in self.orphans.items():
            self._say(f"{name} is still running from a launcher that was killed (process {found.pid}); waiting for it")
        jobs = [self._job(name, len(names)) for name in names]
        with Supervisor() as supervisor, self._display(shown) as look:
            supervisor.adopted += [one.pid for one in self.orphans.values()]
            try:
                supervisor.run_all(jobs, self.slots, refused=self._refused, occupied=self._occupied, look=look)
            except KeyboardInterrupt:
                self._stopping = True
                self._say("stopping; `resume` continues from the last checkpoints (Ctrl-C again: end them at once)")
                raise
        for name in self._failed:
            self._say(f"failed: {name}: {last_error(self.folder.log_path(name))}")
        return 1 if self._failed else 0

    def _job(self, name: str, total: int) -> Job:
        job = run_job(self.folder, name, self.processes, lambda command, code: self._ended(name, command.began, code))

        def start(slot: Slot) -> Command:
            command = job.start(slot)
            self._started += 1
            self._say(f"[{self._started}/{total}] {name} started · {self.folder.log_path(name)}")
            return command

        return replace(job, start=start)

    def _ended(self, name: str, began: float, code: int | None) -> None:
        took = duration(time.monotonic() - began)
        if code in (0, None) and self.folder.finished(name):
            status = run_status(self.folder, name)
            perplexity = f", validation perplexity {status.perplexity:.4g}" if status.perplexity else ""
            self._say(f"{name} finished in {took}{perplexity}")
        elif self._stopping:
            self._say(f"{name} stopped after {took}")
        else:
            self._failed.append(name)
            how = f"failed after {took} (exit code {code})" if code is not None else "ended without finishing"
            self._say(f"{name} {how}; the others continue")

    def _refused(self, job: Job, error: UserError) -> None:
        """It could not be started. If another launcher has taken it since, that one reports on it; anything else is a failure."""
        self._say(str(error))
        if not (self.folder.run_lock(job.name).held() or self.folder.finished(job.name)):
            self._failed.append(job.name)

    def _occupied(self) -> list[Slot]:
        """The slots of the orphans that are still running."""
        for name in list(self.orphans):
            if not self.folder.run_lock(name).held():
                del self.orphans[name]
                self._ended(name, time.monotonic(), None)
        return [one.slot for one in self.orphans.values()]

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def _display(self, shown: list[str]) -> Iterator[Callable[[], None]]:
        """Yields a function that shows progress: a table on a terminal, elsewhere a line every few minutes."""
        line, redraw = Every(LINE), Every(REFRESH)

        def table() -> Table:
            return render(self.folder.record["name"], [run_status(self.folder, name) for name in shown])

        if not self.console.is_terminal:
            yield lambda: self._say(self._line(shown)) if line.due() else None
            return
        live = Live(table(), console=self.console, auto_refresh=False)

        with live:
            yield lambda: live.update(table(), refresh=True) if redraw.due() else None
            live.update(table(), refresh=True)

    def _line(self, shown: list[str]) -> str:
        """``2 of 6 finished, 1 failed · x2-s1 batch 40/300, loss 4.1, 3m 20s left``."""
        runs = [run_status(self.folder, name) for name in shown]
        finished, failed = (sum(run.state == state for run in runs) for state in ("finished", "failed"))
        parts = [f"{finished} of {len(runs)} finished" + (f", {failed} failed" if failed else "")]
        for run in runs:
            if run.under_way:
                loss = f", loss {run.loss:.4f}" if run.loss is not None else ""
                left = f", {duration(run.left)} left" if run.left is not None else ""
                parts.append(f"{run.name} batch {run.batch}/{run.batches or '?'}{loss}{left}")
        return " · ".join(parts)
