"""What the launchers of both schedulers share: which runs, and the command of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mohd_train import resources
from mohd_train.sweep.folder import SweepFolder
from mohd_train.utils import jobs
from mohd_train.utils.environment import verb_command


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(jobs.ClusterOptions):
    """How runs are submitted.

    Attributes:
        processes: GPUs, and processes, of each run: one node.
        parallel: runs at once (SLURM); None: as many as fit.
    """

    processes: int
    parallel: int | None = None


def run_command(folder: SweepFolder, processes: int) -> list[str]:
    """What a job calls, but for the run's name, which comes last."""
    return verb_command("sweep", "run", folder.path.resolve(), "--processes", processes, "--only")


def common_values(folder: SweepFolder, options: ClusterOptions) -> dict[str, object]:
    """What every template may name."""
    return {
        "folder": folder.path.resolve(),
        "checkout": resources.root(),
        "cwd": Path.cwd(),
        "gpus": options.processes,
    }
