"""The commands of `mohd study`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from mohd_train.study.recorded import add_recorded
from mohd_train.study.report import show
from mohd_train.study.runs import Study, read_study


def _read(folder: Path, records: list[Path]) -> Study:
    study = read_study(folder)
    for file in records:
        add_recorded(study, file)
    return study


def status(folder: Path, records: list[Path]) -> None:
    """The number of runs in each state, and every comparison on the results so far."""
    study = _read(folder, records)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    states = [run.state for run in study.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"{study.title} · --scale {study.scale} · {counts}", soft_wrap=True)
    console.print(show(study))


def figures(folder: Path, records: list[Path], output: Path | None) -> None:
    """Draws every comparison."""
    from mohd_train.study.figures import draw_study

    for path in draw_study(_read(folder, records), output or folder / "figures"):
        print(path)


def record(folder: Path, records: list[Path], output: Path, name: str | None) -> None:
    """Writes the record, and prints the files."""
    from mohd_train.study.record import write_record

    for path in write_record(_read(folder, records), output, name):
        print(path)
