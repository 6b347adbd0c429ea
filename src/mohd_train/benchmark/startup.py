"""Seconds from the command to the first batch of a run, and where they go."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mohd_train.config.load import load_config
from mohd_train.data.manifest import load_manifest
from mohd_train.errors import UserError
from mohd_train.sweep.data import data_overrides
from mohd_train.utils.environment import verb_command

LIBRARIES = "import torch, composer, streaming, transformers"


def measure(data: Path, rounds: int) -> list[dict[str, Any]]:
    """In turn: an interpreter that imports the libraries and ends, one that imports ``mohd train``, ``--dry-run``, and a run of
    ``configs/model/tiny.yaml`` until its first batch is in ``metrics.jsonl``.

    Returns:
        A row for each: the first round's seconds (files perhaps not in memory yet), and the median of the others.
    """
    args = [*tiny_run(data), "configs/mohd/x2.yaml"]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            run = Path(folder) / str(number)
            train = verb_command("train", *args, f"run_folder={run}", "max_duration=2ba")
            for name, command, until in (
                ("libraries", [sys.executable, "-c", LIBRARIES], None),
                ("this package", [sys.executable, "-c", "import mohd_train.train.train"], None),
                ("checks (--dry-run)", [*train, "--dry-run"], None),
                ("first batch", train, run / "metrics.jsonl"),
            ):
                seconds.setdefault(name, []).append(_seconds(command, until))
    return [{"name": name, "first": times[0], "again": statistics.median(times[1:])} for name, times in seconds.items()]


def tiny_run(data: Path) -> list[str]:
    """Files and overrides of a run of the tiny model on whatever data was prepared, on a CPU."""
    files, local = ["configs/recipe/tiny.yaml", "configs/model/tiny.yaml"], f"data.local={data}"
    args = data_overrides(data, load_config(files, [local]), "tiny")
    return [*files, *args, f"max_seq_len={load_manifest(data).seq_len}", "device=cpu"]


def _seconds(command: list[str], until: Path | None) -> float:
    """Until the process ends, or until there is a line in ``until``."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found = None
    while process.poll() is None and found is None:
        time.sleep(0.005)
        if until is not None and until.is_file() and until.stat().st_size:
            found = time.perf_counter() - start
    _, errors = process.communicate()
    if process.returncode:
        raise UserError(f"{' '.join(command[1:5])} ... failed: {errors.strip()[-500:]}")
    return found or time.perf_counter() - start
