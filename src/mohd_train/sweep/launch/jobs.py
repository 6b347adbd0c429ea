"""What the launchers of both schedulers share: options, templates, calls of the scheduler's programs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.sweep.file import CHECKOUT
from mohd_train.sweep.folder import SweepFolder

TEMPLATES = CHECKOUT / "scripts/launch"


@dataclass(frozen=True)
class ClusterOptions:
    """How jobs are submitted.

    Attributes:
        processes: GPUs, and processes, of each run: one node.
        parallel: runs at once (SLURM); None: as many as fit.
        template: of the job, in place of the project's.
        arguments: further arguments for sbatch or kubectl apply.
        image, namespace, claim: Kubernetes: the container image, the namespace, ``PVC:MOUNT_PATH`` of the shared file system.
    """

    processes: int
    parallel: int | None = None
    template: Path | None = None
    arguments: tuple[str, ...] = ()
    image: str | None = None
    namespace: str = "default"
    claim: str | None = None


def fill(template: Path, values: dict[str, object]) -> str:
    """A template's text with every ``{{name}}`` replaced. Raises UserError for a missing file or an unknown name."""
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{template}: can't read the job template ({error.strerror})") from None
    for name in re.findall(r"\{\{(\w+)\}\}", text):
        if name not in values:
            raise UserError(f"{template}: unknown placeholder {{{{{name}}}}}; known: {', '.join(values)}")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), text)


def call(command: list[str]) -> str:
    """Output of a scheduler's program. Raises UserError if it isn't installed here or refuses."""
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no {command[0]} here; launch from a machine of the cluster, or use --launcher local")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout.strip()


def run_command(folder: SweepFolder, processes: int) -> list[str]:
    """What a job calls, but for the run's name, which comes last."""
    words = [sys.executable, str(CHECKOUT / "scripts/sweep.py"), "run", str(folder.path.resolve())]
    return [*words, "--processes", str(processes), "--only"]


def common_values(folder: SweepFolder, options: ClusterOptions) -> dict[str, object]:
    """What every template may name."""
    return {
        "folder": folder.path.resolve(),
        "checkout": CHECKOUT,
        "cwd": Path.cwd(),
        "gpus": options.processes,
    }
