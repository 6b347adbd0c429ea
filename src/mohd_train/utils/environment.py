"""What a result was computed with: versions, code, hardware, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mohd_train

# What decides the numbers of a run, an evaluation, a study.
PACKAGES = (
    "torch",
    "liger-kernel",
    "mosaicml",
    "mosaicml-streaming",
    "transformers",
    "tokenizers",
    "datasets",
    "lm-eval",
    "liger-kernel",
    "numpy",
    "triton",
    "omegaconf",
)


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of this project, Python and those of ``packages`` that are installed."""
    found = {"mohd_train": mohd_train.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def verb_command(verb: str, *args: object) -> list[str]:
    """The command line of ``mohd VERB`` in this interpreter, from any folder, with or without a checkout."""
    return [sys.executable, "-m", "mohd_train.cli", verb, *map(str, args)]


def code_version() -> dict[str, Any]:
    """Version of the package; commit and whether the tree has changes, if it runs from a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": mohd_train.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def cpu_name() -> str:
    """The processor's own name, such as ``AMD EPYC 7B13``; the architecture if the system doesn't say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def hardware(device: str, processes: int = 1) -> dict[str, Any]:
    """The devices that ``processes`` run on; ``device`` is ``gpu`` (or ``cuda``) or ``cpu``."""
    import torch

    gpu = device in ("gpu", "cuda")
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "processes": processes,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
    }
