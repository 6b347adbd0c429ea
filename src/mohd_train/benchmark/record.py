"""The benchmark of record: everything that is wanted of a machine, each part in a process of its own, into one folder."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from mohd_train.benchmark.report import device_name
from mohd_train.errors import UserError

ALL_355M = "355m:50,355m:75,355m:x2,355m:x3,355m:x4"
LAYER = ("--mode", "layer", "--threads", "1", "--tokens", "2048", "--rounds", "8")
TRAIN = ("--mode", "train", "--seq-len", "4096", "--rounds", "10")
X4 = ("--models", "355m:x4")
DECODE = (*X4, "--tokens", "1024", "--rounds", "30")
PROJECTIONS = (*X4, "--mode", "projections", "--layers", "3", "--threads", "1", "--tokens", "128", "--rounds", "20")


def _on_cuda() -> dict[str, tuple[str, ...]]:
    """Tokens such that 80 GB should do, reckoned: activations, one model's gradients, the weights of all models of a part."""
    parts: dict[str, tuple[str, ...]] = {}
    for kernels in ("grouped", "triton"):
        words = (*TRAIN, "--kernels", kernels)
        parts[f"train-355m-{kernels}"] = ("--models", ALL_355M, *words, "--tokens", "16384")
        for kind in ("50", "x2", "x4"):
            parts[f"train-1.13b-{kind}-{kernels}"] = ("--models", f"1.13b:{kind}", *words, "--tokens", "8192")
    for mode in ("decode", "projections"):
        for batch in ("1", "8"):
            parts[f"{mode}-x4-batch-{batch}"] = (*DECODE, "--mode", mode, "--batch", batch)
    return parts


PARTS: dict[str, dict[str, tuple[str, ...]]] = {  # device: name of a part: words of its command line
    "cuda": _on_cuda(),
    "cpu": {
        "1-thread-layer": ("--models", ALL_355M, *LAYER),
        "1-thread-projections-x4-batch-1": (*PROJECTIONS, "--batch", "1"),
        "1-thread-projections-x4-batch-8": (*PROJECTIONS, "--batch", "8"),
    },
}


def record(script: Path, folder: Path, device: str) -> int:
    """Runs every part of `device` by `script` (scripts/benchmark.py); results and plots go to `folder`, none over another's.

    Returns:
        0, or 1 where a part failed; the others are there all the same.

    Raises:
        UserError: `folder` can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--record {folder}: {error.strerror}") from error
    console, failed = Console(stderr=True), []
    machine = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device_name(device).lower())).strip("-")
    for number, (name, words) in enumerate(PARTS[device].items(), 1):
        file = _free(folder, f"{datetime.now(timezone.utc):%Y-%m-%d}-{machine}-{name}")
        console.print(f"part {number} of {len(PARTS[device])}, {name}: {file}", highlight=False)
        plot = ("--plot", str(file.with_suffix(".png")))
        command = [sys.executable, str(script), "--device", device, *words, "--json", str(file), *plot]
        if (code := subprocess.run(command).returncode) != 0:
            failed.append(f"{name} (exit {code})")
    if failed:
        console.print(f"failed: {', '.join(failed)}; what it said stands above. The other parts are in {folder}")
    return 1 if failed else 0


def _free(folder: Path, stem: str) -> Path:
    """A name that nothing has yet."""
    count, file = 1, folder / f"{stem}.json"
    while file.exists():
        count += 1
        file = folder / f"{stem}-{count}.json"
    return file
