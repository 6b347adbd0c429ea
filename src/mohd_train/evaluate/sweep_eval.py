"""Every finished run of a sweep through `eval/run_eval.py`, several at once on several GPUs; what is stored is reused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.evaluate.options import SweepEvalOptions
from mohd_train.evaluate.sweep_results import RESULTS
from mohd_train.sweep.file import CHECKOUT
from mohd_train.sweep.folder import RECORD, SweepFolder
from mohd_train.sweep.local import slots, visible_gpus
from mohd_train.sweep.status import last_error, run_status

LATEST = "checkpoints/latest-rank0.pt"


def commands(folder: SweepFolder, words: list[str]) -> dict[str, list[str]]:
    """Run -> the command that evaluates it, for the finished runs."""
    data = [] if "--perplexity" not in words or "--data" in words else ["--data", str(folder.source.place(folder.path))]
    program = [sys.executable, str(CHECKOUT / "eval" / "run_eval.py"), "--output", str(folder.path / RESULTS)]
    return {
        name: [*program, "--checkpoint", str(folder.path / name / LATEST), "--name", name, *words, *data]
        for name in folder.runs
        if folder.finished(name)
    }


def run_sweep(options: SweepEvalOptions) -> int:
    """Evaluates, ``jobs`` checkpoints at a time, with a log for each. Returns 1 if one failed; it is named, the others go on.

    Raises:
        UserError: no launched sweep, no finished run in it, or fewer GPUs than ``jobs``.
    """
    if not (options.sweep / RECORD).is_file():
        raise UserError(f"{options.sweep} is not the folder of a launched sweep (it has no {RECORD})")
    folder = SweepFolder(options.sweep)
    todo = list(commands(folder, options.words).items())
    for name in folder.runs:
        if not folder.finished(name):
            print(f"{name}: {run_status(folder, name).state}, passed over", flush=True)
    if not todo:
        raise UserError(f"{options.sweep} has no finished run; python scripts/sweep.py resume {options.sweep}")
    free = slots(1, options.jobs or max(1, len(visible_gpus())), on_cpu=False)
    at_work: list[tuple[str, subprocess.Popen[bytes], dict[str, str]]] = []
    failed, total, done = [], len(todo), 0
    try:
        while todo or at_work:
            while todo and free:
                name, command = todo.pop(0)
                at_work.append((name, _start(command, _log(folder, name), free[0]), free.pop(0)))
            time.sleep(0.2)
            for name, process, slot in [job for job in at_work if job[1].poll() is not None]:
                at_work.remove((name, process, slot))
                free.append(slot)
                done += 1
                failed += [name] if process.returncode else []
                how = f"failed: {last_error(_log(folder, name))}" if process.returncode else "evaluated"
                print(f"[{done}/{total}] {name}: {how} · {_log(folder, name)}", flush=True)
    finally:
        for _, process, _ in at_work:  # interrupted: tasks that are done are stored
            process.terminate()
    return 1 if failed else 0


def _log(folder: SweepFolder, name: str) -> Path:
    return folder.path / "logs" / f"{name}.eval.log"


def _start(command: list[str], log: Path, slot: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=os.environ | slot)
