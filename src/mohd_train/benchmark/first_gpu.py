"""``mohd benchmark --first-gpu``: everything worth doing in the first minutes on a GPU, in order of worth, within a time.

Each part is a command of its own. A failure does not stop the others, and a part that the time limit cuts off keeps what it has
written. A second call with the same folder continues with the parts that are not done. Nothing here
needs a GPU: on a CPU the same parts run on tiny models.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mohd_train import resources
from mohd_train.benchmark.record import ALL_355M, PEERS, machine_name
from mohd_train.benchmark.report import machine
from mohd_train.config.load import load_config
from mohd_train.errors import UserError
from mohd_train.estimate.hardware import GPUS
from mohd_train.estimate.launch import estimate
from mohd_train.run_folder.metrics import last_values
from mohd_train.run_folder.paths import METRICS
from mohd_train.utils.environment import verb_command
from mohd_train.utils.files import write_atomic, write_json
from mohd_train.utils.processes import Command, end_groups
from mohd_train.utils.text import first_line

SUMMARY, GRACE = "summary", 20.0  # seconds that a part has to end by itself once it is cut off
SPEED, MFU, PEAK = "throughput/tokens_per_sec", "throughput/device/mfu", "memory/peak_allocated_mem"
MICROBATCH = "trainer/device_train_microbatch_size"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        least: seconds below which it is not worth starting.
        result: the file that it writes, below the folder.
        config: of a run: its arguments, for the estimate.
    """

    name: str
    command: list[str]
    least: float
    result: str
    config: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """What the parts are measured at."""

    layers: str
    kernels: tuple[str, ...]
    workload: tuple[str, ...]
    train: tuple[str, ...]
    model: str
    run: tuple[str, ...]
    vocab: int
    seq_len: int
    scale: str
    least: float  # least seconds left for a part to be started


SIZES = {
    "cuda": Sizes(
        ALL_355M, ("grouped", "triton"), ("--tokens", "16384", "--seq-len", "4096", "--rounds", "6"),
        ("--models", "355m:x2", "--mode", "train", "--tokens", "16384", "--seq-len", "4096", "--rounds", "5"),
        "configs/model/355m.yaml", ("global_train_batch_size=64", "device_train_microbatch_size=auto"), 4096, 4096, "medium", 60,
    ),
    "cpu": Sizes(
        "tiny:50,tiny:x2", ("grouped",), ("--tokens", "64", "--rounds", "1", "--threads", "1", "--no-compile"),
        ("--models", "tiny:x2", "--mode", "train", "--tokens", "64", "--rounds", "1", "--threads", "1", "--no-compile"),
        "configs/model/tiny.yaml",
        (
            "global_train_batch_size=2", "device_train_microbatch_size=2", "device=cpu", "precision=fp32", "fsdp_config=null",
            "compile=false",
        ),
        1024, 64, "tiny", 5,
    ),
}  # fmt: skip


def parts(folder: Path, device: str, data: Path | None) -> list[Part]:
    """All parts, in order of worth; the study only where there is data for it."""
    sizes, python = SIZES[device], sys.executable
    small, found = folder / "data", []
    tests = resources.root() / "tests/kernels/test_on_gpu.py"
    if tests.is_file():  # in a checkout
        command = [
            python,
            "-m",
            "pytest",
            str(tests),
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={folder}/kernels.xml",
        ]
        found.append(Part("kernels", command, sizes.least, "kernels.xml"))

    def benchmark(name: str, *args: str) -> Part:
        return Part(
            name,
            verb_command("benchmark", "--device", device, *args, "--json", folder / f"{name}.json"),
            sizes.least,
            f"{name}.json",
        )

    for kernels in sizes.kernels:
        found.append(
            benchmark(
                f"layers-{kernels}", "--models", sizes.layers, "--mode", "layer", "--kernels", kernels, *sizes.workload
            )
        )
    found.append(benchmark("train", *sizes.train))
    corpus, pieces = folder / "corpus", folder / "pieces.model"
    prepared = (
        "--raw",
        corpus,
        "--tokenizer",
        pieces,
        "--out",
        small,
        "--seq-len",
        sizes.seq_len,
        "--val-tokens",
        20 * sizes.seq_len,
    )
    found += [
        Part("corpus", verb_command("demo", "corpus", corpus), 5, "corpus"),
        Part(
            "tokenizer",
            verb_command("demo", "tokenizer", corpus, pieces, "--vocab-size", sizes.vocab),
            5,
            "pieces.model",
        ),
        Part("data", verb_command("prepare", *prepared), 5, "data/manifest.json"),
    ]
    gpus = max(1, torch.cuda.device_count()) if device == "cuda" else 1
    for recipe in ("paper_50b", "ablation_10b"):
        for setting in ("dense", "x2"):
            name = f"run-{recipe}-{setting}"
            config = (
                f"configs/recipe/{recipe}.yaml", sizes.model, f"configs/mohd/{setting}.yaml", f"run_name={name}",
                f"run_folder={folder}/{name}", f"data.local={small}", "data.domains={code: 1, manual: 1, readme: 1}",
                "data.optional_domains=[]", f"model.vocab_size={sizes.vocab}", f"max_seq_len={sizes.seq_len}", "data.num_workers=1",
                "max_duration=6ba", "eval_interval=6ba", "eval_subset_num_batches=1", "save_interval=6ba", "loggers={}",
                "callbacks.memory_monitor={}", "callbacks.speed_monitor.window_size=2", "progress_bar=false", *sizes.run,
            )  # fmt: skip
            command = verb_command("train", *config)
            if gpus > 1:
                command = [python, "-m", "composer.cli.launcher", "-n", str(gpus), *command[1:]]
            found.append(Part(name, command, sizes.least, f"{name}/{METRICS}", config))
    if data is not None:
        study = (
            "launch",
            "configs/sweep/study.yaml",
            "--scale",
            sizes.scale,
            "--data",
            data,
            "--out",
            folder / "study",
        )
        found.append(Part("study", verb_command("sweep", *study, "--parallel", 4 * gpus), 4 * sizes.least, "study"))
    found.append(
        benchmark(
            "decode",
            *("--models", sizes.layers.rpartition(",")[2], "--mode", "decode", "--rounds", "5", "--tokens", "64"),
        )
    )
    if device == "cuda":
        found += [benchmark(name, *command) for name, command in PEERS["cuda"].items()]
    return found


def run(folder: Path, minutes: float, device: str | None, data: Path | None) -> int:
    """Runs the parts that are not done yet until the time is over, and rewrites ``summary.json`` and ``summary.md`` after each.

    Args:
        folder: the result goes to ``folder/DATE-GPU-first``, or there if it is such a folder of an earlier call.
        data: prepared data at sequence length 512, for the study.

    Returns:
        1 if a part failed, 2 if the time cut one off or left one out, else 0.
    """
    end = time.monotonic() + 60 * minutes
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not (folder / f"{SUMMARY}.json").is_file():
        today = datetime.datetime.now(datetime.timezone.utc).date()
        folder = folder / f"{today}-{machine_name(device)}-first"
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--first-gpu {folder}: {error.strerror}") from error
    summary = _read(folder)
    summary["environment"] = machine(device)
    console, wanted = Console(stderr=True), parts(folder, device, data)
    for number, part in enumerate(wanted, 1):
        if summary["parts"].get(part.name, {}).get("state") == "done":
            continue
        left = end - time.monotonic()
        console.print(f"[{number}/{len(wanted)}] {part.name}, {left / 60:.1f} min left", highlight=False, markup=False)
        summary["parts"][part.name] = (
            {"state": "left out", "why": "no time"} if left < part.least else _do(part, folder, left)
        )
        summary["parts"][part.name]["found"] = _found(part, folder, device)
        write_json(folder / f"{SUMMARY}.json", summary)
        write_atomic(folder / f"{SUMMARY}.md", _page(summary))
    states = [summary["parts"][part.name]["state"] for part in wanted]
    console.print(
        f"{folder}/{SUMMARY}.md: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    )
    return 1 if "failed" in states else 2 if {"cut off", "left out"} & set(states) else 0


def _read(folder: Path) -> dict[str, Any]:
    file = folder / f"{SUMMARY}.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {"parts": {}}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({first_line(error)}); move it away, or choose another folder") from None
    return found


def _do(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    log = folder / "logs" / f"{part.name}.log"
    command = Command(part.command, log)
    try:
        while command.poll() is None and time.monotonic() - command.began < seconds:
            time.sleep(0.1)
        cut_off = command.poll() is None
    finally:
        end_groups([command.pid], grace=GRACE, reap=command.poll)
    entry = {
        "state": "cut off" if cut_off else "done" if command.poll() == 0 else "failed",
        "command": " ".join(part.command[1:]).replace(str(folder), "."),
        "seconds": round(time.monotonic() - command.began, 1),
    }
    if entry["state"] == "failed":
        said = log.read_text("utf-8", errors="replace").strip().splitlines()
        entry["why"] = f"exit {command.poll()}: {said[-1] if said else ''}; logs/{log.name}"
    return entry


def _found(part: Part, folder: Path, device: str) -> dict[str, Any]:
    """The main numbers of a part's result, complete or not."""
    result = folder / part.result
    if not result.exists():
        return {}
    if part.config:
        return _of_run(part, result, device)
    if result.suffix == ".xml":
        suites = list(ET.parse(result).getroot().iter("testsuite"))
        return {
            key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
        }
    if result.suffix != ".json" or part.name == "data":
        return {}
    rows = json.loads(result.read_text("utf-8"))["rows"]
    return {row["model"]: {key: round(row[key], 4) for key in ("ratio_median", "mfu")} for row in rows}


def _of_run(part: Part, metrics: Path, device: str) -> dict[str, Any]:
    """Speed and memory of a run, and the estimate for that GPU and microbatch, in GiB."""
    values = last_values(metrics, (SPEED, MFU, PEAK, MICROBATCH))
    found = {key.rpartition("/")[2]: round(values[key], 4) for key in (SPEED, MFU, MICROBATCH) if key in values}
    if PEAK in values:  # Composer's gigabytes
        found["peak_gib"] = round(values[PEAK] * 1e9 / (1 << 30), 2)
    name = torch.cuda.get_device_name().lower() if device == "cuda" else "cpu"
    gpu = next((gpu for key, gpu in GPUS.items() if key.partition("-")[0] in name), None)
    if gpu is not None and MICROBATCH in values:
        files = [word for word in part.config if "=" not in word]
        overrides = [word for word in part.config if "=" in word] + [
            f"device_train_microbatch_size={values[MICROBATCH]}"
        ]
        found["estimated_gib"] = round(
            estimate(load_config(files, overrides), gpu, torch.cuda.device_count()).needed / (1 << 30), 2
        )
    return found


def _page(summary: dict[str, Any]) -> str:
    environment, lines = summary["environment"], ["| part | state | s | |", "|---|---|---:|---|"]
    for name, entry in summary["parts"].items():
        said = entry.get("why") or "; ".join(f"{key}: {_short(value)}" for key, value in entry["found"].items())
        lines.append(f"| {name} | {entry['state']} | {entry.get('seconds', '–')} | {said.replace('|', '/')} |")
    head = f"# {environment['device']}, {environment['date'][:10]}, torch {environment['torch']}, commit {environment['commit']}"
    return "\n".join([head, "", *lines, ""])


def _short(value: Any) -> str:
    return ", ".join(f"{key} {number}" for key, number in value.items()) if isinstance(value, dict) else str(value)
