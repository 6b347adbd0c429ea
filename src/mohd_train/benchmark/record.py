"""The benchmark of record: all measurements of a machine for benchmarks/, each part in its own process, in one folder."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import torch
from rich.console import Console

from mohd_train.errors import UserError
from mohd_train.utils.environment import hardware, now, verb_command

ALL_355M = "355m:50,355m:75,355m:x2,355m:x3,355m:x4"
LAYER = ("--mode", "layer", "--threads", "1", "--tokens", "2048", "--rounds", "8")
TRAIN = ("--mode", "train", "--seq-len", "4096", "--rounds", "10")
X4 = ("--models", "355m:x4")
DECODE = (*X4, "--tokens", "1024", "--rounds", "30")
PROJECTIONS = (*X4, "--mode", "projections", "--layers", "3", "--threads", "1", "--tokens", "128", "--rounds", "20")


def _on_cuda() -> dict[str, tuple[str, ...]]:
    """With as many tokens as should fit 80 GB: activations and gradients of one model, weights of all models in a part. This is an
    estimate, not a measurement."""
    parts: dict[str, tuple[str, ...]] = {}
    for kernels in ("grouped", "triton"):
        args = (*TRAIN, "--kernels", kernels)
        parts[f"train-355m-{kernels}"] = ("--models", ALL_355M, *args, "--tokens", "16384")
        for kind in ("50", "x2", "x4"):
            parts[f"train-1.13b-{kind}-{kernels}"] = ("--models", f"1.13b:{kind}", *args, "--tokens", "8192")
    for mode in ("decode", "projections"):
        for batch in ("1", "8"):
            parts[f"{mode}-x4-batch-{batch}"] = (*DECODE, "--mode", mode, "--batch", batch)
    return parts


PARTS: dict[str, dict[str, tuple[str, ...]]] = {  # by device, then by name of the part: its arguments
    "cuda": _on_cuda(),
    "cpu": {
        "1-thread-layer": ("--models", ALL_355M, *LAYER),
        "1-thread-projections-x4-batch-1": (*PROJECTIONS, "--batch", "1"),
        "1-thread-projections-x4-batch-8": (*PROJECTIONS, "--batch", "8"),
    },
}


_PEERS = "355m:hf-llama,355m:x2,355m:x3,355m:x4," + ",".join(
    f"355m:{kind}-x{size}" for size in (2, 3, 4) for kind in ("moe", "hf-mixtral")
)
_LAYER_PEERS = _PEERS + (
    ",355m:litgpt" if importlib.util.find_spec("litgpt") else ""
)  # make benchmark-peers installs it
PEERS: dict[str, dict[str, tuple[str, ...]]] = {  # the same beside transformers' and litgpt's models
    "cuda": {
        "peers-layer": ("--models", _LAYER_PEERS, "--mode", "layer", "--tokens", "16384", "--rounds", "10"),
        "peers-decode": ("--models", _PEERS, "--mode", "decode", "--tokens", "1024", "--rounds", "30"),
    },
    "cpu": {
        "1-thread-peers-layer": ("--models", _LAYER_PEERS, *LAYER),
        "1-thread-peers-decode": (
            *("--models", _PEERS, "--mode", "decode", "--layers", "4", "--threads", "1", "--tokens", "256"),
            *("--rounds", "20"),
        ),
    },
}


def pipeline_parts(data: Path | None, raw: Path | None, tokenizer: Path | None) -> dict[str, tuple[str, ...]]:
    """A run, its start and its data preparation compared with their alternatives: those whose input is given."""
    parts: dict[str, tuple[str, ...]] = {}
    if data is not None:
        parts["loop"] = ("--mode", "loop", "--data", str(data), "--rounds", "8")
        parts["start"] = ("--mode", "start", "--data", str(data), "--rounds", "3")
    if raw is not None and tokenizer is not None:
        for workers in ("1", "2"):
            given = ("--raw", str(raw), "--tokenizer", str(tokenizer), "--workers", workers, "--rounds", "2")
            parts[f"prepare-{workers}-workers"] = ("--mode", "prepare", *given)
    return parts


def record(
    folder: Path, device: str | None, *, peers: bool = False, pipeline: dict[str, tuple[str, ...]] | None = None
) -> int:
    """Measures every part of `device` (None: the GPU if there is one). Results and plots go to `folder` and overwrite nothing.

    Args:
        peers: ours beside transformers' and litgpt's models (:data:`PEERS`) in place of :data:`PARTS`.
        pipeline: :func:`pipeline_parts`, measured first.

    Returns:
        0, or 1 if a part failed; it doesn't stop the others.

    Raises:
        UserError: `folder` can't be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--record {folder}: {error.strerror}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console, failed, parts = Console(stderr=True), [], (pipeline or {}) | (PEERS if peers else PARTS)[device]
    machine = machine_name(device)
    for number, (name, args) in enumerate(parts.items(), 1):
        file = _unused(folder, f"{now()[:10]}-{machine}-{name}")
        console.print(f"part {number} of {len(parts)}, {name}: {file}", highlight=False)
        plot = ("--plot", str(file.with_suffix(".png")))
        command = verb_command("benchmark", "--device", device, *args, "--json", file, *plot)
        if (code := subprocess.run(command).returncode) != 0:
            failed.append(f"{name} (exit {code})")
    if failed:
        console.print(f"failed: {', '.join(failed)}; see the messages above. The other parts are in {folder}")
    return 1 if failed else 0


def machine_name(device: str) -> str:
    """The device's own name, as part of a file's."""
    name = hardware(device)["device"].lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name)).strip("-")


def _unused(folder: Path, stem: str) -> Path:
    """An unused file name."""
    count, file = 1, folder / f"{stem}.json"
    while file.exists():
        count += 1
        file = folder / f"{stem}-{count}.json"
    return file
