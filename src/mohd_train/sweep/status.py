"""The status of a sweep: each run's state, progress, loss, time left and last error, read from what the runs write."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.markup import escape
from rich.table import Table

from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.metrics import last_values
from mohd_train.run_folder.paths import METRICS
from mohd_train.sweep.expand import total_batches
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch import kubernetes, slurm
from mohd_train.utils.text import duration, first_line

LOSS, PERPLEXITY, CLOCK = "loss/train/cross_entropy", "metrics/eval/LanguagePerplexity", "time/total"
TAIL = 1 << 16  # bytes read from the end of a log
# waiting: not started · queued: in a scheduler's queue · starting: no batch yet · stopped: by Ctrl-C or a scheduler's notice ·
# killed: exited without an error message · unreadable: its config or run.json is broken
STATES = ("waiting", "queued", "starting", "running", "stopped", "killed", "failed", "unreadable", "finished")
FAILED_STATES = ("failed", "killed", "unreadable")
COLOURS = {
    "finished": "green",
    "failed": "red",
    "killed": "red",
    "unreadable": "red",
    "stopped": "yellow",
    "running": "cyan",
    "starting": "cyan",
}


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        state: one of ``STATES``.
        batch, batches: done, and of the whole run (None: depends on the data).
        loss: training cross-entropy of the last batch, nats.
        perplexity: of the last validation, all domains.
        seconds: trained so far, validation included.
        left: estimated seconds to the end; only for a run in progress.
        error: one line; only for failed runs.
    """

    name: str
    state: str
    batch: int = 0
    batches: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    seconds: float | None = None
    left: float | None = None
    error: str | None = None

    @property
    def under_way(self) -> bool:
        """Whether it is queued or being trained."""
        return self.state in ("queued", "starting", "running")


def last_error(log: Path) -> str | None:
    """The line of a log that gives the reason: the last of the form ``error: ...`` or ``SomeError: ...``, else the last one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return None
    start = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    lines = lines[start + 1 :]  # of the last start only
    telling = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    found = telling or lines
    return found[-1] if found else None


def run_status(folder: SweepFolder, name: str, job_state: str | None = None) -> RunStatus:
    """The status of one run. A broken file affects only its own row: ``error`` says what is wrong.

    Args:
        job_state: ``queued`` or ``running`` where a scheduler says so.
    """
    record, problem = folder.run_record(name), folder.record_problem(name)
    values = last_values(folder.path / name / METRICS, ("batch", LOSS, CLOCK, PERPLEXITY))
    batch, batches = values.get("batch", 0), None
    try:
        batches = total_batches(_config(folder, name))
    except UserError as broken:
        problem = problem or str(broken)
    held = folder.run_lock(name).held()
    state = "unreadable" if problem else _state(folder, name, record, job_state, held, bool(batch))
    seconds = values[CLOCK] * 3600 if CLOCK in values else None
    left = seconds * (batches - batch) / batch if state == "running" and seconds and batch and batches else None
    error = problem
    if state in ("failed", "killed"):
        error = (
            (record or {}).get("error") or last_error(folder.log_path(name)) or "it exited without a message (killed?)"
        )
    return RunStatus(
        name,
        state,
        batch,
        batches,
        values.get(LOSS),
        values.get(PERPLEXITY),
        seconds,
        left,
        first_line(error) if error else None,
    )


def _config(folder: SweepFolder, name: str) -> Config:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), folder.config(name)))
    assert isinstance(config, Config)
    return config


def _state(
    folder: SweepFolder, name: str, record: dict[str, Any] | None, job: str | None, held: bool, trained: bool
) -> str:
    said = record["status"] if record else None
    if said == "finished":
        return "finished"
    if held or job == "running":
        return "running" if trained and said == "running" else "starting"
    if job == "queued":
        return "queued"
    ended = folder.exit_path(name)
    if said in ("interrupted", "preempted"):
        return "stopped"
    if said == "failed" or (ended.exists() and ended.read_text().strip() != "0"):
        return "failed"
    return "killed" if said == "running" or folder.log_path(name).exists() else "waiting"


def job_states(folder: SweepFolder) -> tuple[dict[str, str], list[str]]:
    """Run -> ``queued`` | ``running`` according to the schedulers, for each run's newest launch; and notes on schedulers that
    couldn't be asked."""
    states: dict[str, str] = {}
    notes: list[str] = []
    launches = {id(launch): launch for name in folder.runs if (launch := folder.launch_of(name))}
    for launch in launches.values():
        ask = {"slurm": slurm.states, "k8s": kubernetes.states}.get(launch["launcher"])
        if ask is None:
            continue
        try:
            found = ask(launch)
        except UserError as error:
            notes.append(str(error))
            continue
        states |= {name: state for name, state in found.items() if folder.launch_of(name) is launch}
    return states, notes


def render(title: str, runs: list[RunStatus]) -> Table:
    """The table that ``status`` and ``launch`` show."""
    counts = ", ".join(f"{n} {state}" for state in reversed(STATES) if (n := sum(run.state == state for run in runs)))
    table = Table(title=f"{title} · {counts}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("run", "state", "batch", "loss", "val ppl", "time", "left", "last error"):
        numeric = head in ("batch", "loss", "val ppl", "time", "left")
        table.add_column(head, justify="right" if numeric else "left", no_wrap=head != "last error", overflow="fold")
    for run in runs:
        colour = COLOURS.get(run.state)
        done = f"{run.batch}/{run.batches}" if run.batches else str(run.batch)
        table.add_row(
            run.name,
            f"[{colour}]{run.state}[/]" if colour else run.state,
            done + (f" {run.batch / run.batches:4.0%}" if run.batches else ""),
            f"{run.loss:.4f}" if run.loss is not None else "–",
            f"{run.perplexity:.4g}" if run.perplexity is not None else "–",
            duration(run.seconds) if run.seconds is not None else "",
            duration(run.left) if run.left is not None else "",
            escape(run.error or ""),
        )
    return table
