"""A launched sweep so far: the state, curve and results of each run; for each model and setting the mean over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.results import store
from mohd_train.results.store import TOTAL, Missing, Result
from mohd_train.results.suite import load_suite
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.run_folder.paths import METRICS
from mohd_train.storage import is_remote
from mohd_train.sweep.folder import RECORD, SweepFolder
from mohd_train.sweep.scale import paper_name
from mohd_train.sweep.status import RunStatus, run_status

RESULTS = "eval"  # the folder of a sweep that mohd eval --sweep fills
PERPLEXITY = "metrics/eval/LanguagePerplexity"


@dataclass(frozen=True)
class Mean:
    """Mean over ``n`` seeds, with its standard error if there are two or more; ``unfinished`` of them had not ended."""

    value: float
    error: float | None
    n: int
    unfinished: int = 0


def mean(values: list[float], unfinished: int = 0) -> Mean | None:
    """Mean and standard error (sample standard deviation over the root of n); None if there are no values."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error, len(values), unfinished)


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        label: what the setting is, in words.
        record: its ``run.json``; None if it has not started.
        metrics: the lines of its ``metrics.jsonl``.
        tasks: task -> its stored result.
        measured: the stored result of ``mohd eval --perplexity``.
        missing: why it lacks results.
    """

    status: RunStatus
    model: str
    setting: str
    label: str
    seed: int
    plan: ModelPlan
    folder: Path
    record: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    tasks: dict[str, Result]
    measured: dict[str, Any] | None
    missing: list[Missing] = field(default_factory=list)

    @property
    def row(self) -> str:
        """Its row in Table 2, named after the paper's: ``355m-x2``, at any scale and seed."""
        return f"{self.base}-{self.setting}"

    @property
    def name(self) -> str:
        """``tiny-355m-x2-s17``."""
        return self.status.name

    @property
    def base(self) -> str:
        """The paper's model that it represents: ``355m``, at any scale."""
        return paper_name(self.model)

    @property
    def unfinished(self) -> str:
        """Its progress, if it has not ended: ``stopped, batch 30``; else empty."""
        return "" if self.status.state == "finished" else f"{self.status.state}, batch {self.status.batch}"

    @property
    def results(self) -> dict[str, Result]:
        """:attr:`tasks`, whose model says so if the run is unfinished."""
        if not self.unfinished:
            return self.tasks
        return {
            task: replace(one, model={**one.model, "unfinished": self.unfinished}) for task, one in self.tasks.items()
        }

    @property
    def measured_file(self) -> Path:
        """The file of :attr:`measured`."""
        return self.folder.parent / RESULTS / self.name / store.PERPLEXITY

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, values) of a logged metric."""
        rows = [(line["tokens"], line[key]) for line in self.metrics if key in line]
        return [float(tokens) for tokens, _ in rows], [float(value) for _, value in rows]


@dataclass
class SweepResults:
    """A sweep. ``notes`` list what was set aside, and why."""

    folder: Path
    name: str
    title: str
    scale: str
    runs: list[RunResult]
    notes: list[str] = field(default_factory=list)

    def titled(self, text: str) -> str:
        """A figure's title, with the scale if it isn't the paper's."""
        return text if self.scale == "paper" else f"{text} ({self.scale} scale)"

    def groups(self) -> dict[tuple[str, str], list[RunResult]]:
        """(model, setting) -> its runs, one a seed, in the sweep's order."""
        found: dict[tuple[str, str], list[RunResult]] = {}
        for run in self.runs:
            found.setdefault((run.model, run.setting), []).append(run)
        return found

    def of(self, setting: str) -> list[RunResult]:
        """The runs with a setting."""
        return [run for run in self.runs if run.setting == setting]

    def perplexity_source(self) -> tuple[str, Callable[[RunResult], float | None]]:
        """One source for a whole column: the stored measurements if every finished run has one on the same data, else the
        validation within training. Returns its name, and a function from a run to its perplexity."""
        finished = [run for run in self.runs if run.status.state == "finished"]
        settings = {json.dumps(run.measured and run.measured["settings"], sort_keys=True) for run in finished}
        if finished and len(settings) == 1 and all(run.measured for run in finished):
            asked = finished[0].measured["settings"] if finished[0].measured else {}
            size = f" of {asked['batch_size']}" if asked.get("batch_size") else ""
            part = f", the first {asked['limit']} batches{size} of each domain" if asked.get("limit") else ""
            return f"mohd eval --perplexity{part}", lambda run: run.measured and run.measured[TOTAL]["perplexity"]
        return "the last validation within training", lambda run: run.status.perplexity

    def perplexity(self, runs: list[RunResult]) -> Mean | None:
        """The mean over seeds. Unfinished runs count only if no seed is finished, and are marked."""
        _, of = self.perplexity_source()
        finished = [value for run in runs if run.status.state == "finished" and (value := of(run)) is not None]
        if finished:
            return mean(finished)
        rest = [value for run in runs if (value := run.status.perplexity) is not None]
        return mean(rest, unfinished=len(rest))


def is_sweep(sources: Sequence[Path | str]) -> bool:
    """Whether ``sources`` is the folder of one launched sweep, not of results."""
    return len(sources) == 1 and not is_remote(sources[0]) and (Path(sources[0]) / RECORD).is_file()


def read_sweep_results(path: Path) -> SweepResults:
    """Reads a sweep's folder; broken results are set aside and named in the notes.

    Raises:
        UserError: no sweep was launched there.
    """
    if not is_sweep([path]):
        raise UserError(
            f"{path} is not the folder of a launched sweep (it has no {RECORD}); mohd sweep launch makes one"
        )
    folder = SweepFolder(path)
    found = SweepResults(path, folder.record["name"], folder.record["title"], folder.record["scale"], [])
    for name, entry in folder.runs.items():
        status = run_status(folder, name)
        tasks, measured = _stored(path / RESULTS / name, found.notes)
        missing = store.read_missing(path / RESULTS / name, found.notes)
        if status.state != "finished" and status.batch:
            total = f" of {status.batches}" if status.batches else ""
            found.notes.append(f"{name} is not finished ({status.state}, batch {status.batch}{total})")
        run = RunResult(
            status=status,
            model=entry["model"],
            setting=entry["setting"],
            label=entry["label"],
            seed=entry["seed"],
            plan=ModelPlan.from_dict(entry["plan"]),
            folder=path / name,
            record=folder.run_record(name),
            metrics=read_metrics(path / name / METRICS, found.notes),
            tasks=tasks,
            measured=measured,
            missing=missing,
        )
        found.runs.append(run)
    return found


def _stored(folder: Path, notes: list[str]) -> tuple[dict[str, Result], dict[str, Any] | None]:
    """Task -> result, and the perplexity result, of one run."""
    tasks: dict[str, Result] = {}
    measured = None
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if file.name.startswith(".") or file.name.endswith(".missing.json"):
            continue
        try:
            if file.name == store.PERPLEXITY:
                measured = store.read_perplexity(file)
            else:
                result = store.read(file)
                tasks[result.settings.task] = result
        except UserError as error:
            notes.append(f"{file} is broken and set aside ({str(error).removeprefix(f'{file} ')})")
    return tasks, measured


def merged_tasks(found: SweepResults) -> list[Result]:
    """One result for each model, setting and task: the mean over seeds, named after the paper's rows (``355m-x2``).

    Results with other settings (shots, metric, harness, questions) than the suite's or the first seed's are not averaged but
    named in the notes. Those of unfinished runs count, marked, only if no finished run has one.
    """
    suite, merged = load_suite(), []
    for runs in found.groups().values():
        parts: dict[str, dict[str, Result]] = {}
        for task in dict.fromkeys(task for run in runs for task in run.tasks if task in suite.tasks):
            all_of = [(run.name, run.results[task]) for run in runs if task in run.tasks]
            all_of.sort(
                key=lambda one: (bool(store.settings_mismatch(suite, one[1].settings)), "unfinished" in one[1].model)
            )
            first = all_of[0][1]
            parts[task] = {name: one for name, one in all_of if _alike(one, first)}
            for _, other in all_of:
                if not _alike(other, first):
                    how = (
                        "is not of a finished run"
                        if other.settings == first.settings
                        else "was evaluated with other settings"
                    )
                    found.notes.append(f"{other.path} {how}, unlike {first.path}; left out of the mean")
        seeds = max(map(len, parts.values()), default=0)
        for task, some in parts.items():
            if len(some) < seeds:
                found.notes.append(f"{runs[0].row} {task}: of {len(some)} seeds, not {seeds}")
            merged.append(_merge(some, runs[0].row))
    return merged


def missing_tasks(found: SweepResults) -> list[Missing]:
    """Why rows of Table 2 lack a task, under the names that :func:`merged_tasks` gives."""
    return [
        replace(one, model={**one.model, "name": run.row, "fingerprint": run.row})
        for run in found.runs
        for one in run.missing
    ]


def _alike(one: Result, other: Result) -> bool:
    """Whether two seeds' results may stand in one mean."""
    return one.settings == other.settings and ("unfinished" in one.model) == ("unfinished" in other.model)


def _merge(runs: dict[str, Result], row: str) -> Result:
    """The mean over runs that differ only by seed, with the standard error over seeds. A single run's result is only renamed."""
    alike = list(runs.values())
    model = {**alike[0].model, "name": row, "fingerprint": row}
    if len(alike) == 1:
        return replace(alike[0], model=model)
    metric = alike[0].settings.metric
    return replace(
        alike[0],
        scores=_means([one.scores for one in alike]),
        subject_scores={
            subject: _means([one.subject_scores.get(subject, {}) for one in alike])
            for subject in alike[0].subject_scores
        },
        model=model,
        by_seed={name: value for name, one in runs.items() if (value := one.scores.get(metric)) is not None},
    )


def _means(parts: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Score -> mean, and standard error over ``parts``; None if one of them lacks it."""
    means: dict[str, float | None] = {}
    for key in parts[0]:
        if key.endswith("_stderr"):
            continue
        values = [value for one in parts if (value := one.get(key)) is not None]
        spread = mean(values) if len(values) == len(parts) else None
        means[key] = spread.value if spread else None
        if f"{key}_stderr" in parts[0]:
            means[f"{key}_stderr"] = spread.error if spread else None
    return means
