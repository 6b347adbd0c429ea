"""A launched study whose runs have known losses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mohd_train.sweep.data import DataSource
from mohd_train.sweep.expand import Choice, SweepRun, expand
from mohd_train.sweep.file import read_sweep
from mohd_train.sweep.folder import SweepFolder

FILE = """
name: small
title: a small study
recipe: ablation_10b
seeds: [1, 2, 3]
runs:
  - models: [355m]
    settings: [dense, x2, {name: x2-bare, base: x2, label: bare, set: {mohd.fusion: none}}]
  - models: [355m]
    seeds: [1]
    suffix: low
    label: low lr
    set: {optimizer.lr: 1.0e-3}
    settings: [x2, dense]
comparisons:
  - {title: parts, baseline: x2, paper: 10.0, rows: {x2-bare: 11.0, dense: 12.0}}
  - {title: rates, rows: [x2, dense], variants: [low, null]}
"""
POINTS = tuple(100 * n for n in range(1, 9))  # batches
Loss = Callable[[SweepRun, int], float]


def make_study(
    folder: Path,
    loss: Loss,
    *,
    data: str = "data",
    finished: Callable[[SweepRun], bool] = lambda run: True,
) -> SweepFolder:
    """Writes the sweep and, for each run, the validations ``loss(run, batch)``; a run that isn't finished has half of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(FILE)
    sweep = read_sweep(path)
    choice = Choice("small", overrides=("max_duration=800ba",))
    out = folder / "out"
    runs = expand(sweep, choice, out)
    there = SweepFolder(out)
    there.claim(sweep, choice, DataSource(folder=data), runs)
    for run in runs:
        write_run(there, run, loss, finished(run))
    return there


def write_run(folder: SweepFolder, run: SweepRun, loss: Loss, finished: bool = True, data: str = "d") -> None:
    """run.json and metrics.jsonl of a run."""
    place = folder.path / run.name
    place.mkdir(exist_ok=True)
    points = POINTS if finished else POINTS[:4]
    record = {
        "status": "finished" if finished else "interrupted", "batch": points[-1], "config": dataclasses.asdict(run.config),
        "data": {"sha256": data}, "code": {"commit": "c" * 40}, "versions": {"torch": "2"}, "ended": "2026-11-26T01:00:00+00:00",
        "sessions": [{"hardware": {"device": "abacus", "processes": 1}}], "parameters": {"activated": 754, "total": 2032},
    }  # fmt: skip
    (place / "run.json").write_text(json.dumps(record))
    lines = []
    for batch in points:
        value = loss(run, batch)
        line: dict[str, Any] = {"batch": batch, "tokens": 4096 * batch, "time/total": batch / 1000}
        line |= {"metrics/eval/LanguageCrossEntropy": value, "metrics/eval/LanguagePerplexity": math.exp(value)}
        lines.append(json.dumps(line) + "\n")
    (place / "metrics.jsonl").write_text("".join(lines))


def store_measured(
    folder: SweepFolder, run: str, domains: dict[str, tuple[list[int], list[float]]], **settings: Any
) -> None:
    """A perplexity result as run_eval.py --perplexity stores it: domain -> tokens and summed loss of each document."""
    entries = {
        name: {"tokens": sum(tokens), "nll": sum(nll), "documents": {"tokens": tokens, "nll": nll}}
        for name, (tokens, nll) in domains.items()
    }
    tokens, nll = (sum(entry[key] for entry in entries.values()) for key in ("tokens", "nll"))
    content = {
        "format": "mohd_train.perplexity/1",
        "settings": {"data": "d", "limit": None, **settings},
        "total": {"tokens": tokens, "nll": nll, "loss": nll / tokens, "perplexity": math.exp(nll / tokens)},
        "domains": entries,
    }
    path = folder.path / "eval" / run / "perplexity.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"mohd_train": content}))
