"""A launched sweep with records written by hand, and stored results for its runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mohd_train.results import store as results
from mohd_train.results.suite import load_suite
from mohd_train.sweep.data import DataSource
from mohd_train.sweep.expand import Choice, expand
from mohd_train.sweep.file import CONFIGS, read_sweep
from mohd_train.sweep.folder import SweepFolder


def make_sweep(
    path: Path, name: str, perplexity: Any, seeds: tuple[int, ...] = (1,), only: tuple[str, ...] = ()
) -> SweepFolder:
    """A launched sweep at the tiny scale whose runs ended with ``perplexity(setting, seed)``; None: not started, < 0: cut off."""
    sweep = read_sweep(CONFIGS / "sweep" / f"{name}.yaml")
    choice = Choice("tiny", seeds, only, ("max_duration=300ba",))
    runs = expand(sweep, choice, path)
    folder = SweepFolder(path)
    folder.claim(sweep, choice, DataSource(folder="data"), runs)
    for run in runs:
        value = perplexity(run.setting, run.seed)
        if value is None:
            continue
        write_run(path / run.name, run, abs(value), "finished" if value > 0 else "interrupted")
    return folder


def write_run(folder: Path, run: Any, perplexity: float, status: str) -> None:
    folder.mkdir()
    session = {"hardware": {"processes": 2, "device": "abacus"}}
    record = {
        "status": status,
        "batch": 300,
        "config": dataclasses.asdict(run.config),
        "sessions": [session],
        "versions": {"torch": "2"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = []
    for batch in (10, 20, 300 if status == "finished" else 30):
        line: dict[str, Any] = {
            "batch": batch,
            "tokens": 4096 * batch,
            "loss/train/cross_entropy": 3.0,
            "time/total": batch / 3000,
        }
        line["throughput/device/tokens_per_sec"] = 1000.0
        line["metrics/eval/LanguagePerplexity"] = perplexity * 300 / batch if status == "finished" else perplexity
        part = run.plan.ffn
        if part is not None:
            line["loss/train/balance"] = 0.08
            line |= {
                f"routing/layer{i}/ffn/share/{n}": 1.0 if n < part.shared else 0.2
                for i in range(4)
                for n in range(part.sub_dims)
            }
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def store(folder: SweepFolder, run: str, task: str, score: float, **changes: Any) -> None:
    """A result as run_eval.py --sweep stores it."""
    suite = load_suite()
    spec = suite.tasks[task]
    settings = results.Settings(task, spec.shots, "acc", suite.seed, None, suite.lm_eval, "auto", "float32", "hub")
    model = {"name": run, "fingerprint": f"f-{run}", "activated": 754_000, "total": 1_500_000, "checkpoint": "c"}
    ours = {
        "format": results.FORMAT, "settings": dataclasses.asdict(dataclasses.replace(settings, **changes)), "model": model,
        "scores": {"acc": score, "acc_stderr": 0.01}, "questions": spec.questions, "subjects": spec.subjects,
        "truncated": {"requests": 0, "of": 9, "tokens": 0, "longest": 9},
    }  # fmt: skip
    path = folder.path / "eval" / run / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({results.KEY: ours, "results": {}}))
