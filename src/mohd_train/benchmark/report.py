"""From times to rows (ratios, throughput, utilization), as JSON, a table and a plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mohd_train.benchmark.cases import Workload
from mohd_train.benchmark.measure import Peak, clock_of
from mohd_train.errors import UserError
from mohd_train.utils.environment import code_version, hardware, now
from mohd_train.utils.files import atomic_path, write_json


@dataclass(frozen=True)
class Measured:
    """The measurements of one model."""

    times: list[float]
    flops: float
    activation_bytes: int | None
    peak_memory: int | None
    backend: str
    error: float | None  # None for a peer with weights of its own


def row(name: str, baseline: str, models: dict[str, Measured], workload: Workload, peak: float) -> dict[str, Any]:
    """A model's row: its figures, and ratios to its baseline of times in the same round, when both met the same conditions."""
    own, base = models[name], models[baseline]
    ratios = [a / b for a, b in zip(own.times, base.times, strict=True)]
    seconds = min(own.times)
    tokens = workload.batch if workload.mode in ("decode", "projections") else workload.tokens
    both = own.activation_bytes and base.activation_bytes
    return {
        "model": name,
        "baseline": baseline,
        "mode": workload.mode,
        "tokens": workload.tokens,
        "seq_len": workload.seq_len,
        "batch": workload.batch,
        "backend": own.backend,
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_of_minima": seconds / min(base.times),
        "arithmetic_ratio": own.flops / base.flops,
        "seconds_min": seconds,
        "seconds_median": statistics.median(own.times),
        "tokens_per_second": tokens / seconds,
        "mfu": own.flops / seconds / peak,
        "activation_bytes": own.activation_bytes,
        "activation_ratio": own.activation_bytes / base.activation_bytes if both else None,  # type: ignore[operator]
        "peak_memory": own.peak_memory,
        "error_against_reference": own.error,
    }


def environment(workload: Workload, peak: Peak) -> dict[str, Any]:
    """What the figures of models depend on."""
    return {
        **machine(workload.device.type),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "compile": workload.compile,
        "clock": clock_of(workload)[0],
        "peak_tflops": peak.flops / 1e12,
        "peak_source": peak.source,
    }


def machine(device: str) -> dict[str, Any]:
    """What every figure depends on, and how it was taken."""
    return {
        "command": _command(),
        "date": now(),
        "commit": code_version()["commit"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": hardware(device)["device"],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _command() -> str:
    """The command line, without the paths of the record and its plot: those files get moved."""
    args = [arg for place, arg in enumerate(sys.argv[1:]) if (place, arg) != (0, "benchmark")]  # mohd benchmark ...
    for option in ("--json", "--plot"):
        if option in args:
            index = args.index(option)
            args = args[:index] + args[index + 2 :]
    return " ".join(["mohd benchmark", *args])


def write_results(path: Path, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes a results file."""
    write_json(path, {"environment": env, "rows": rows})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        UserError: the file is missing, or not a results file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert isinstance(rows, list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: not the results of a benchmark ({error!r}); give a file that --json wrote") from None
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws each model's ratio to its baseline: by arithmetic, of both models' fastest rounds, and the median over rounds.

    Not the smallest ratio of a round, which one slow round of the baseline decides.
    """
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    shown = [entry for entry in rows if entry["model"] != entry["baseline"]]
    figure, axes = pyplot.subplots(figsize=(1.4 * len(shown) + 2, 3.6))
    xs = range(len(shown))
    for shift, key, label in ((-0.27, "arithmetic_ratio", "arithmetic"), (0, "ratio_of_minima", "fastest rounds")):
        axes.bar([x + shift for x in xs], [entry[key] for entry in shown], 0.25, label=label)
    axes.bar([x + 0.27 for x in xs], [entry["ratio_median"] for entry in shown], 0.25, label="median")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(xs), [f"{entry['model']}\n{entry.get('sweep', '')}".strip() for entry in shown])
    axes.set_ylabel("time of a step / LLaMA's")
    axes.legend(frameon=False, ncols=3, loc="upper left", fontsize="small")
    axes.set_ylim(top=1.2 * max(entry["ratio_median"] for entry in shown))
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)


def render(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title="Time of a step / the baseline's: least and median over rounds, ratio of the fastest rounds")
    titles = ("model", "backend", "tokens", "least", "median", "fastest", "arith.", "ms", "tokens/s", "MFU", "kept")
    for title in titles:
        table.add_column(title, justify="left" if title in ("model", "backend") else "right", no_wrap=True)
    for entry in rows:
        kept = entry["activation_ratio"]
        table.add_row(
            f"{entry['model']} {entry.get('sweep', '')}".strip(),
            entry["backend"],
            str(entry["tokens"]),
            f"{entry['ratio_min']:.3f}",
            f"{entry['ratio_median']:.3f}",
            f"{entry['ratio_of_minima']:.3f}",
            f"{entry['arithmetic_ratio']:.3f}",
            f"{1e3 * entry['seconds_min']:.1f}",
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['mfu']:.0%}",
            "–" if kept is None else f"{kept:.2f}",
        )
    return table
