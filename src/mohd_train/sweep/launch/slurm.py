"""Runs as one SLURM array job, a task for each: rendered to a file, then submitted."""

from __future__ import annotations

import shlex
from typing import Any

from mohd_train.errors import UserError
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch.jobs import ClusterOptions, common_values, run_command
from mohd_train.utils.jobs import TEMPLATES, Rendered, call, fill, sbatch, shell_word

TEMPLATE = TEMPLATES / "sweep.sbatch"
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT")


def submit(folder: SweepFolder, names: list[str], options: ClusterOptions) -> dict[str, Any]:
    """One array job, a task for each run. Returns the launch's record.

    Raises:
        UserError: no sbatch, or it refuses.
    """
    number = len(folder.record["launches"]) + 1
    listing = folder.path / "jobs" / f"launch-{number}.runs"
    listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    at_once = f"%{options.parallel}" if options.parallel else ""
    values = (
        common_values(folder, options)
        | {
            "name": f"mohd-{folder.record['name']}",
            "log": f"{str(folder.path.resolve()).replace('%', '%%')}/jobs/%A_%a.log",  # SLURM fills in what follows a single %
            "array": f"0-{len(names) - 1}{at_once}",
            "runs": listing.resolve(),
            "command": Rendered(shlex.join(run_command(folder, options.processes))),
        }
    )
    script = folder.path / "jobs" / f"launch-{number}.sbatch"
    script.write_text(fill(options.template or TEMPLATE, values, shell_word), encoding="utf-8")
    job = sbatch(*options.arguments, str(script))
    try:
        return folder.add_launch("slurm", names, job=job, script=str(script), processes=options.processes)
    except OSError as error:  # the disk is full: the job would be unknown to later commands
        raise UserError(
            f"SLURM took the runs as job {job}, but {folder.path} can't be written to ({error.strerror}), so that a later "
            f"launch would start them twice: scancel {job}, make room, and launch again"
        ) from None


def states(launch: dict[str, Any]) -> dict[str, str]:
    """Run -> ``queued`` | ``running``, of those that SLURM still has. Raises UserError if it can't be asked."""
    try:
        output = call(["squeue", "--noheader", "--array", f"--jobs={launch['job']}", "--format=%K %T"])
    except UserError as error:
        if "Invalid job id" in str(error):  # how squeue reports a job that ended long ago
            return {}
        raise
    found = {}
    for line in output.splitlines():
        task, _, word = line.strip().partition(" ")
        state = "queued" if word in QUEUED else "running" if word in RUNNING else None
        if state and task.isdigit() and int(task) < len(launch["runs"]):
            found[launch["runs"][int(task)]] = state
    return found
