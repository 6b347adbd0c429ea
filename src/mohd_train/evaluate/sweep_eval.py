"""Evaluates every finished run of a sweep with `mohd eval`, several at once on several GPUs."""

from __future__ import annotations

import functools
import time
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.evaluate.options import SweepEvalOptions
from mohd_train.results.sweep_results import RESULTS
from mohd_train.run_folder.paths import latest_checkpoint
from mohd_train.sweep.folder import RECORD, SweepFolder
from mohd_train.sweep.launch.local import LINE, slots, visible_gpus
from mohd_train.sweep.status import last_error, run_status
from mohd_train.utils.environment import verb_command
from mohd_train.utils.processes import Command, Every, Job, Slot, Supervisor
from mohd_train.utils.text import duration


def commands(folder: SweepFolder, arguments: list[str]) -> dict[str, list[str]]:
    """Run -> the command that evaluates it, for the finished runs."""
    data = (
        []
        if "--perplexity" not in arguments or "--data" in arguments
        else ["--data", str(folder.source.place(folder.path))]
    )
    program = verb_command("eval", "--output", folder.path / RESULTS)
    return {
        name: [*program, "--checkpoint", str(latest_checkpoint(folder.path / name)), "--name", name, *arguments, *data]
        for name in folder.runs
        if folder.finished(name)
    }


def run_sweep(options: SweepEvalOptions) -> int:
    """Evaluates ``jobs`` checkpoints at a time, with a log for each. Returns 1 if one failed; it is named, the others continue.

    Raises:
        UserError: no launched sweep, no finished run in it, or fewer GPUs than ``jobs``.
    """
    if not (options.sweep / RECORD).is_file():
        raise UserError(f"{options.sweep} is not the folder of a launched sweep (it has no {RECORD})")
    folder = SweepFolder(options.sweep)
    todo = commands(folder, options.arguments)
    for name in folder.runs:
        if not folder.finished(name):
            print(f"{name}: {run_status(folder, name).state}, skipped", flush=True)
    if not todo:
        raise UserError(f"{options.sweep} has no finished run; mohd sweep resume {options.sweep}")
    failed, ended, total = [], 0, len(todo)

    def report(name: str, how: str) -> None:
        nonlocal ended
        ended += 1
        print(f"[{ended}/{total}] {name}: {how} · {_log(folder, name)}", flush=True)

    def note_end(name: str, code: int) -> None:
        failed.extend([name] if code else [])
        report(name, f"failed: {last_error(_log(folder, name))}" if code else "evaluated")

    def refused(job: Job, error: UserError) -> None:
        failed.append(job.name)
        report(job.name, str(error))

    def job(name: str, command: list[str]) -> Job:
        start = functools.partial(_start, command, _log(folder, name))
        return Job(name, start, lambda command, code: note_end(name, code))

    began, line = time.monotonic(), Every(LINE)

    def look() -> None:
        if line.due():
            print(f"{ended} of {total} evaluated; running for {duration(time.monotonic() - began)}", flush=True)

    places = slots(1, options.jobs or max(1, len(visible_gpus())), on_cpu=False)
    with Supervisor() as supervisor:  # interrupted: finished tasks are stored
        supervisor.run_all([job(*one) for one in todo.items()], places, refused=refused, look=look)
    return 1 if failed else 0


def _start(command: list[str], log: Path, slot: Slot) -> Command:
    return Command(command, log, environment=slot)


def _log(folder: SweepFolder, name: str) -> Path:
    return folder.path / "logs" / f"{name}.eval.log"
