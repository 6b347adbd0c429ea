"""From times to rows: ratios, throughput, utilization; JSON and a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mohd_train.benchmark.cases import Settings
from mohd_train.benchmark.measure import Peak, clock_of
from mohd_train.errors import UserError


@dataclass(frozen=True)
class Measured:
    """One model's figures before it is compared."""

    times: list[float]
    flops: float
    activation_bytes: int | None
    peak_memory: int | None
    backend: str
    error: float


def row(name: str, baseline: str, models: dict[str, Measured], settings: Settings, peak: float) -> dict[str, Any]:
    """A model against its baseline; ratios are of times within the same round, so that both met the same machine."""
    own, base = models[name], models[baseline]
    ratios = [a / b for a, b in zip(own.times, base.times, strict=True)]
    seconds = min(own.times)
    tokens = settings.batch if settings.mode in ("decode", "projections") else settings.tokens
    both = own.activation_bytes and base.activation_bytes
    return {
        "model": name,
        "baseline": baseline,
        "mode": settings.mode,
        "tokens": settings.tokens,
        "seq_len": settings.seq_len,
        "batch": settings.batch,
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


def environment(settings: Settings, peak: Peak) -> dict[str, Any]:
    """What the figures depend on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": _command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(settings.device.type),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": str(settings.dtype).removeprefix("torch."),
        "compile": settings.compile,
        "clock": clock_of(settings)[0],
        "peak_tflops": peak.flops / 1e12,
        "peak_source": peak.source,
    }


def _command() -> str:
    """What was typed, but for where the record and its plot went: they move."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for option in ("--json", "--plot"):
        if option in words:
            place = words.index(option)
            words = words[:place] + words[place + 2 :]
    return "python scripts/" + " ".join(words)


def device_name(kind: str) -> str:
    """What the GPU or the processor calls itself."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The results file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        UserError: not there, or not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found["rows"], list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: no results of a benchmark ({error!r}); give a file that --json wrote") from None
    return dict(found)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Each model's ratio to its baseline, of the two fastest rounds and in the median of pairs, beside the arithmetic's.

    Not the least of the pairs: one slow round of the baseline makes it.
    """
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    shown = [entry for entry in rows if entry["model"] != entry["baseline"]]
    figure, axes = pyplot.subplots(figsize=(1.4 * len(shown) + 2, 3.6))
    places = range(len(shown))
    for shift, key, label in ((-0.27, "arithmetic_ratio", "arithmetic"), (0, "ratio_of_minima", "fastest rounds")):
        axes.bar([place + shift for place in places], [entry[key] for entry in shown], 0.25, label=label)
    axes.bar([place + 0.27 for place in places], [entry["ratio_median"] for entry in shown], 0.25, label="median")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(places), [f"{entry['model']}\n{entry.get('sweep', '')}".strip() for entry in shown])
    axes.set_ylabel("time of a step / LLaMA's")
    axes.legend(frameon=False, ncols=3, loc="upper left", fontsize="small")
    axes.set_ylim(top=1.2 * max(entry["ratio_median"] for entry in shown))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def render(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(
        title="Time of a step over the baseline's, rounds in turn: least and median of pairs, of the fastest rounds"
    )
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
