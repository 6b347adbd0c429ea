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
from mohd_train.benchmark.measure import clock_of


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
    tokens = settings.batch if settings.mode == "decode" else settings.tokens
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


def environment(settings: Settings, peak: float, source: str) -> dict[str, Any]:
    """What the figures depend on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    cuda = settings.device.type == "cuda"
    return {
        "command": " ".join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": str(settings.dtype).removeprefix("torch."),
        "compile": settings.compile,
        "clock": clock_of(settings)[0],
        "peak_tflops": peak / 1e12,
        "peak_source": source,
    }


def _cpu_name() -> str:
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


def render(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(title="Time of a step against the baseline's, rounds in turn")
    for title in ("model", "backend", "tokens", "ratio min", "median", "arithmetic", "ms", "tokens/s", "MFU", "kept"):
        table.add_column(title, justify="left" if title in ("model", "backend") else "right")
    for entry in rows:
        kept = entry["activation_ratio"]
        table.add_row(
            entry["model"],
            entry["backend"],
            str(entry["tokens"]),
            f"{entry['ratio_min']:.3f}",
            f"{entry['ratio_median']:.3f}",
            f"{entry['arithmetic_ratio']:.3f}",
            f"{1e3 * entry['seconds_min']:.1f}",
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['mfu']:.0%}",
            "–" if kept is None else f"{kept:.2f}",
        )
    return table
