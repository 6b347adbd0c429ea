"""The benchmark's command: models in turn, each checked before it is timed."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mohd_train.benchmark.cases import MODES, Settings, build, flops, read_plan
from mohd_train.benchmark.measure import (
    Peak,
    activation_bytes,
    check_against_reference,
    keep_pages,
    peak_flops,
    peak_memory,
    profiled,
    rounds,
)
from mohd_train.benchmark.report import Measured, environment, plot, read_json, render, row, write_json
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.kernels.ops import resolve_backend

SWEEPS = ("tokens", "sub_dims", "expansion")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--models", default="355m:dense,355m:x2", help="355m:dense,355m:x2,...")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mode", choices=MODES, default="layer")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step (decode: of context)")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence; default: min(tokens, 4096)")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--kernels", default="auto", help="auto, reference, grouped or triton")
    parser.add_argument("--layers", type=int, help="cut the models to so many layers (their shapes stay)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="peak for MFU; default: data sheet, or measured on a CPU")
    parser.add_argument("--sweep", help="tokens=512,1024 or sub_dims=8,16 or expansion=1,2,4: repeat for each value")
    parser.add_argument("--json", type=Path, help="write {environment, rows} there")
    parser.add_argument(
        "--record", type=Path, help="measure all that is wanted of a machine into this folder, part by part"
    )
    parser.add_argument("--load", type=Path, help="measure nothing: show (and plot) the results in this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios there (.svg or .png)")
    parser.add_argument("--profile", action="store_true", help="also show where each model's step spends its time")


def main(configs: Path, arguments: argparse.Namespace) -> int:
    """Measures, prints, draws and writes what the arguments ask for."""
    if arguments.load:
        return show(read_json(arguments.load)["rows"], arguments.plot)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = _settings(arguments)
    keeps = settings.device.type == "cpu" and keep_pages()
    names = [name.strip() for name in arguments.models.split(",") if name.strip()]
    peak = peak_flops(settings, arguments.peak_tflops)
    console, rows = Console(stderr=True), []
    for value, overrides, changed in _sweep(arguments.sweep, settings):
        for entry in compare(names, configs, changed, overrides, arguments, peak, console):
            rows.append({**entry, "sweep": value} if value else entry)
            if arguments.json:
                write_json(arguments.json, {**environment(settings, peak), "keeps_freed_pages": keeps}, rows)
    return show(rows, arguments.plot)


def show(rows: list[dict[str, Any]], picture: Path | None) -> int:
    """The table, and the picture where one is asked for."""
    Console(width=max(112, Console().width)).print(render(rows))  # whole columns in a pipe too
    if picture:
        plot(rows, picture)
    return 0


def compare(
    names: list[str],
    configs: Path,
    settings: Settings,
    overrides: list[str],
    arguments: argparse.Namespace,
    peak: Peak,
    console: Console,
) -> list[dict[str, Any]]:
    """One row a model: it and its baseline (the dense model of its base) timed in turn in this process."""
    rows: list[dict[str, Any]] = []
    for base in dict.fromkeys(name.partition(":")[0] for name in names):
        baseline = f"{base}:dense"
        members = [baseline, *(name for name in names if name.partition(":")[0] == base and name != baseline)]
        plans = {name: read_plan(name, configs, settings, [] if name == baseline else overrides) for name in members}
        steps, found = {}, {}
        for name, plan in plans.items():
            console.print(f"{name}: building, checking against the reference, warming up", highlight=False)
            steps[name], found[name] = _prepare(name, plan, settings)
        for name, times in rounds(steps, arguments.rounds, settings).items():
            found[name] = dataclasses.replace(found[name], times=times)
        peak.again(settings)
        rows += [row(name, baseline, found, settings, peak.flops) for name in members]
        if arguments.profile:
            for name, step in steps.items():
                with profiled(settings) as profile:
                    step()
                by = f"self_{settings.device.type}_time_total"
                Console(width=200).print(
                    f"{name}\n{profile.key_averages().table(sort_by=by, row_limit=20)}", markup=False
                )
        steps.clear()
        gc.collect()
    return rows


def _prepare(name: str, plan: ModelPlan, settings: Settings) -> tuple[Any, Measured]:
    """Builds a model, refuses a backend that can't run it or gives other results, and measures what isn't time."""
    backend = "dense"
    for part in plan.components:
        backend = resolve_backend(settings.kernels, settings.device, settings.dtype, width=part.width)
    step, module, step_of = build(plan, settings)
    error = check_against_reference(name, step, module, step_of, settings) if backend != "dense" else 0.0
    trains = settings.mode in ("train", "layer")
    kept = activation_bytes(step, module) if trains else None
    return step, Measured([], flops(plan, settings), kept, peak_memory(step, settings), backend, error)


def _settings(arguments: argparse.Namespace) -> Settings:
    seq_len = arguments.seq_len or min(arguments.tokens, 4096)
    if arguments.tokens % seq_len:
        raise UserError(f"--tokens {arguments.tokens} is not a multiple of the sequence length {seq_len}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is there; use --device cpu")
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    return Settings(
        mode=arguments.mode,
        device=torch.device(arguments.device),
        dtype=getattr(torch, dtype),
        tokens=arguments.tokens,
        seq_len=seq_len,
        batch=arguments.batch,
        kernels=arguments.kernels,
        compile=not arguments.no_compile,
        layers=arguments.layers or (1 if arguments.mode == "layer" else None),
    )


def _sweep(text: str | None, settings: Settings) -> list[tuple[str, list[str], Settings]]:
    """(label, config overrides, settings) of every point."""
    if text is None:
        return [("", [], settings)]
    key, _, values = text.partition("=")
    if key not in SWEEPS or not values or not all(value.isdigit() for value in values.split(",")):
        raise UserError(
            f"--sweep {text}: give tokens=, sub_dims= or expansion= and whole numbers, as in tokens=512,1024"
        )
    points: list[tuple[str, list[str], Settings]] = []
    for value in values.split(","):
        label = f"{key}={value}"
        if key == "tokens":
            size = int(value)
            points.append((label, [], dataclasses.replace(settings, tokens=size, seq_len=min(size, settings.seq_len))))
        elif key == "sub_dims":
            parts = [f"mohd.{part}.sub_dims={value}" for part in ("attention", "ffn")]
            points.append((label, parts, settings))
        else:
            points.append((label, [f"mohd.expansion={value}"], settings))
    return points
