"""``mohd benchmark --mode loop | prepare | start``: what a user waits for besides the model's arithmetic."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mohd_train.benchmark import PIPELINE, loop, preparation, startup
from mohd_train.benchmark.report import machine, write_results
from mohd_train.errors import UserError

SETTINGS = {"tiny dense": [], "tiny x2": ["configs/mohd/x2.yaml"]}


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints, and writes ``--json``."""
    mode, folder = arguments.mode, getattr(arguments, PIPELINE[arguments.mode])
    if folder is None or not folder.is_dir():
        raise UserError(f"--mode {mode} needs --{PIPELINE[mode]}" + (f": {folder} is not a folder" if folder else ""))
    if mode == "loop":
        torch.set_num_threads(arguments.threads or 1)
        found = {name: loop.measure(folder, words, arguments.rounds) for name, words in SETTINGS.items()}
        rows: list[dict[str, Any]] = [{"name": name, **row} for name, row in found.items()]
    elif mode == "start":
        rows = startup.measure(folder, arguments.rounds)
    else:
        if arguments.tokenizer is None:
            raise UserError("--mode prepare needs --tokenizer")
        rows = preparation.measure(folder, arguments.tokenizer, arguments.workers, arguments.rounds)
    if arguments.json:
        write_results(arguments.json, {**machine("cpu"), "mode": mode}, rows)
    table = Table(*(key.replace("_", " ") for key, value in rows[0].items() if not isinstance(value, list)))
    for row in rows:
        cells = [value for value in row.values() if not isinstance(value, list)]
        table.add_row(*(f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=max(112, Console().width)).print(table)
    return 0
