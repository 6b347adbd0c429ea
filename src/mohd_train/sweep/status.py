"""How a sweep stands: each run's state, progress, loss, time left and last error, read from what the runs write."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.markup import escape
from rich.table import Table

from mohd_train.config.schema import Config
from mohd_train.sweep.expand import total_batches
from mohd_train.sweep.folder import Lock, SweepFolder

LOSS, PERPLEXITY, CLOCK = "loss/train/cross_entropy", "metrics/eval/LanguagePerplexity", "time/total"
BLOCK = 1 << 16
# waiting: not started · queued: in a scheduler's queue · starting: no batch yet · stopped: by Ctrl-C · killed: ended without a word
STATES = ("waiting", "queued", "starting", "running", "stopped", "killed", "failed", "finished")
COLOURS = {
    "finished": "green",
    "failed": "red",
    "killed": "red",
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
        left: seconds to the end at the pace so far; only for a run under way.
        error: one line; only for failed and killed runs.
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
        """Whether something is at work on it."""
        return self.state in ("queued", "starting", "running")


def lines_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file, the last first; read block by block from the end, since the file may be large."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        rest = b""
        while position > 0:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            first, *lines = (file.read(size) + rest).split(b"\n")
            rest = first
            for line in reversed(lines):
                yield from _parsed(line)
        yield from _parsed(rest)


def _parsed(line: bytes) -> Iterator[dict[str, Any]]:
    """The line, unless it is empty or half-written: the run may be writing it now."""
    try:
        value = json.loads(line) if line.strip() else None
    except ValueError:
        return
    if isinstance(value, dict):
        yield value


def last_values(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The newest value of each of ``names`` in a metrics file; those never logged are left out."""
    found: dict[str, Any] = {}
    for record in lines_backwards(path):
        found = {name: record[name] for name in names if name in record} | found
        if len(found) == len(names):
            break
    return found


def last_error(log: Path) -> str | None:
    """The line of a log that says why: the last one of the form ``error: ...`` or ``SomeError: ...``, else the last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - BLOCK))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return None
    start = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    lines = lines[start + 1 :]  # of the last start alone
    telling = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    found = telling or lines
    return found[-1] if found else None


def run_status(folder: SweepFolder, name: str, job_state: str | None = None) -> RunStatus:
    """How one run stands.

    Args:
        job_state: ``queued`` or ``running`` where a scheduler says so.
    """
    record = folder.run_record(name)
    values = last_values(folder.path / name / "metrics.jsonl", ("batch", LOSS, CLOCK, PERPLEXITY))
    batch = values.get("batch", 0)
    batches = total_batches(_config(folder, name))
    held = Lock(folder, name).held()
    state = _state(folder, name, record, job_state, held, bool(batch))
    seconds = values[CLOCK] * 3600 if CLOCK in values else None
    left = seconds * (batches - batch) / batch if state == "running" and seconds and batch and batches else None
    error = None
    if state in ("failed", "killed"):
        error = (record or {}).get("error") or last_error(folder.log_path(name)) or "it ended without a word (killed?)"
    return RunStatus(
        name,
        state,
        batch,
        batches,
        values.get(LOSS),
        values.get(PERPLEXITY),
        seconds,
        left,
        error and str(error).splitlines()[0],
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


def duration(seconds: float | None) -> str:
    """``1d 02h``, ``3h 05m``, ``4m 10s``; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


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
            duration(run.seconds),
            duration(run.left),
            escape(run.error or ""),
        )
    return table
