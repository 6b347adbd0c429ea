"""The benchmark command: models are checked against the reference, then timed in turn."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mohd_train.benchmark import peers
from mohd_train.benchmark.cases import Workload, build, flops, read_plan
from mohd_train.benchmark.measure import (
    Peak,
    activation_bytes,
    check_against_reference,
    check_peer,
    keep_pages,
    peak_flops,
    peak_memory,
    profiled,
    rounds,
)
from mohd_train.benchmark.report import Measured, environment, plot, read_rows, render, row, write_results
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.kernels.ops import resolve_backend

SWEEPS = ("tokens", "sub_dims", "expansion")


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints, plots and writes what the arguments ask for."""
    if arguments.load:
        return show(read_rows(arguments.load), arguments.plot)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    workload = _workload(arguments)
    keeps = workload.device.type == "cpu" and keep_pages()
    names = [name.strip() for name in arguments.models.split(",") if name.strip()]
    peak = peak_flops(workload, arguments.peak_tflops)
    console, rows = Console(stderr=True), []
    for value, overrides, changed in _sweep(arguments.sweep, workload):
        with _constant(value):
            entries = compare(names, changed, overrides, arguments, peak, console)
        for entry in entries:
            rows.append({**entry, "sweep": value} if value else entry)
            if arguments.json:
                write_results(arguments.json, {**environment(workload, peak), "keeps_freed_pages": keeps}, rows)
    return show(rows, arguments.plot)


def show(rows: list[dict[str, Any]], plot_path: Path | None) -> int:
    """Prints the table, and plots it if there is a path."""
    Console(width=max(112, Console().width)).print(render(rows))  # whole columns in a pipe too
    if plot_path:
        plot(rows, plot_path)
    return 0


def compare(
    names: list[str],
    workload: Workload,
    overrides: list[str],
    arguments: argparse.Namespace,
    peak: Peak,
    console: Console,
) -> list[dict[str, Any]]:
    """One row for each model, timed in turn with its baseline: the dense model of the same base."""
    rows: list[dict[str, Any]] = []
    for base in dict.fromkeys(name.partition(":")[0] for name in names):
        baseline = f"{base}:dense"
        members = [baseline, *(name for name in names if name.partition(":")[0] == base and name != baseline)]
        plans = {
            name: peers.plan_of(name, workload)
            if peers.is_peer(name)
            else read_plan(name, workload, [] if name == baseline else overrides)
            for name in members
        }
        steps, found = {}, {}
        for name, plan in plans.items():
            console.print(f"{name}: building, checking against the reference, warming up", highlight=False)
            steps[name], found[name] = _prepare(name, plan, workload)
        for name, times in rounds(steps, arguments.rounds, workload).items():
            found[name] = dataclasses.replace(found[name], times=times)
        peak.remeasure(workload)
        rows += [row(name, baseline, found, workload, peak.flops) for name in members]
        if arguments.profile:
            for name, step in steps.items():
                with profiled(workload) as profile:
                    step()
                by = f"self_{workload.device.type}_time_total"
                Console(width=200).print(
                    f"{name}\n{profile.key_averages().table(sort_by=by, row_limit=20)}", markup=False
                )
        steps.clear()
        gc.collect()
    return rows


def _prepare(name: str, plan: ModelPlan, workload: Workload) -> tuple[Any, Measured]:
    """Builds a model's step, checks it against the reference, and measures everything but time."""
    trains = workload.mode in ("train", "layer")
    if peers.is_peer(name):
        step, module = peers.build(name, plan, workload)
        error = check_peer(name, step, plan, workload) if plan.experts is None else None
        kept = activation_bytes(step, module) if trains else None
        backend = "eager" if plan.experts is not None or not workload.compile else "compiled"
        return step, Measured([], flops(plan, workload), kept, peak_memory(step, workload), backend, error)
    backend = "dense"
    for part in plan.routed.values():
        backend = resolve_backend(
            workload.kernels, workload.device, workload.dtype, width=part.width, choices=part.choices
        )
    step, module, step_of = build(plan, workload)
    error = 0.0
    if backend != "dense":
        error = check_against_reference(name, step, module, step_of, workload)
        if workload.mode == "train" and workload.dtype != torch.float32:
            one = dataclasses.replace(workload, mode="layer", layers=1)
            block = dataclasses.replace(plan, num_hidden_layers=1)
            error = max(error, check_against_reference(name, *build(block, one), one))
    kept = activation_bytes(step, module) if trains else None
    return step, Measured([], flops(plan, workload), kept, peak_memory(step, workload), backend, error)


def _workload(arguments: argparse.Namespace) -> Workload:
    seq_len = arguments.seq_len or min(arguments.tokens, 4096)
    if arguments.tokens % seq_len:
        raise UserError(f"--tokens {arguments.tokens} is not a multiple of the sequence length {seq_len}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device found; use --device cpu")
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    return Workload(
        mode=arguments.mode,
        device=torch.device(device),
        dtype=getattr(torch, dtype),
        tokens=arguments.tokens,
        seq_len=seq_len,
        batch=arguments.batch,
        kernels=arguments.kernels,
        compile=not arguments.no_compile,
        layers=arguments.layers or (1 if arguments.mode == "layer" else None),
    )


def _sweep(text: str | None, workload: Workload) -> list[tuple[str, list[str], Workload]]:
    """(label, config overrides, workload) of every point."""
    if text is None:
        return [("", [], workload)]
    key, _, values = text.partition("=")
    if (
        (key not in SWEEPS and not _is_constant(key))
        or not values
        or not all(value.isdigit() for value in values.split(","))
    ):
        raise UserError(
            f"--sweep {text}: give tokens=, sub_dims=, expansion= or a constant of the kernels (fusion.SUMMED=), and whole "
            "numbers, as in tokens=512,1024"
        )
    points: list[tuple[str, list[str], Workload]] = []
    for value in values.split(","):
        label = f"{key}={value}"
        if key == "tokens":
            size = int(value)
            points.append((label, [], dataclasses.replace(workload, tokens=size, seq_len=min(size, workload.seq_len))))
        elif key == "sub_dims":
            parts = [f"mohd.{part}.sub_dims={value}" for part in ("attention", "ffn")]
            points.append((label, parts, workload))
        elif _is_constant(key):
            points.append((label, [], workload))
        else:
            points.append((label, [f"mohd.expansion={value}"], workload))
    return points


def _is_constant(key: str) -> bool:
    """Whether ``MODULE.NAME`` is a number in a module of :mod:`mohd_train.kernels`, such as ``grouped.sorted_spans.PAGES``."""
    module, _, name = key.rpartition(".")
    if not module or importlib.util.find_spec("mohd_train.kernels." + module.partition(".")[0]) is None:
        return False
    with contextlib.suppress(ImportError):
        return isinstance(getattr(importlib.import_module(f"mohd_train.kernels.{module}"), name, None), int)
    return False


@contextlib.contextmanager
def _constant(label: str) -> Iterator[None]:
    """Sets the constant of a sweep's point, if the sweep is over one, to its value there."""
    key, _, value = label.partition("=")
    if not _is_constant(key):
        yield
        return
    place, _, name = key.rpartition(".")
    module = importlib.import_module(f"mohd_train.kernels.{place}")
    before = getattr(module, name)
    setattr(module, name, int(value))
    torch._dynamo.reset()
    try:
        yield
    finally:
        setattr(module, name, before)
