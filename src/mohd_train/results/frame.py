"""Everything that was measured, as pandas data frames: scores and perplexities, and the curves of training."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mohd_train.errors import UserError
from mohd_train.model.count import count
from mohd_train.results import store
from mohd_train.results.output import local_copy
from mohd_train.results.scores import reasons_of
from mohd_train.results.store import Found, Missing, Result, settings_mismatch
from mohd_train.results.suite import Suite, load_suite
from mohd_train.results.sweep_results import RunResult, is_sweep, read_sweep_results
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.run_folder.paths import METRICS
from mohd_train.run_folder.record import read_record
from mohd_train.storage import refuse_remote
from mohd_train.sweep.folder import SweepFolder

COLUMNS = {
    "model": "string",
    "setting": "string",
    "seed": "Int64",
    "run": "string",
    "task": "string",
    "part": "string",
    "metric": "string",
    "value": "float64",
    "stderr": "float64",
    "n": "Int64",
    "shots": "Int64",
    "notes": "string",
    "activated": "Int64",
    "total": "Int64",
    "checkpoint": "string",
    "fingerprint": "string",
    "file": "string",
}
RUN_COLUMNS = ("model", "setting", "seed", "run")
Source = Path | str
Row = dict[str, Any]


def load(path: Source | Sequence[Source], *, parts: bool = False) -> pd.DataFrame:
    """Every stored score and perplexity: one row for each model, seed, task and metric.

    Args:
        path: the folder of a launched sweep, or result files and folders of ``mohd eval`` (``s3://...`` too); or several.
        parts: also a row for each subject of MMLU and each domain of a perplexity.

    Returns:
        A frame with the columns

        - ``model``: ``355m-x2``; ``setting``, ``seed``, ``run``: of a sweep's run, elsewhere missing;
        - ``task``: as in `eval/tasks.yaml`; ``perplexity`` is what ``mohd eval --perplexity`` measured, ``validation`` the last
          validation within training; ``part``: the subject or domain, missing for the whole task;
        - ``metric``, ``value``, ``stderr``: such as ``acc``, ``acc_norm``, ``acc_macro`` (fractions, not percent), ``perplexity``,
          ``loss`` (nats a token); lm-eval's standard error over questions; ``n``: questions, for a perplexity tokens;
        - ``notes``: what sets the score apart from the paper's, as the marks of Table 2 say it; empty: comparable. A task whose
          questions were unavailable has a missing value and the reason here;
        - ``shots``, ``activated``, ``total`` (parameters as the paper counts them), ``checkpoint``, ``fingerprint``, ``file``.

        ``frame.attrs["notes"]`` lists the files that can't be read; each is also a warning.

    Raises:
        UserError: nothing to read there.
    """
    sources = [path] if isinstance(path, (str, Path)) else list(path)
    suite, rows, notes = load_suite(), [], []
    for source in sources:
        if is_sweep([source]):
            found = read_sweep_results(Path(source))
            notes += found.notes
            for run in found.runs:
                rows += [_of_run(run, row) for row in _run_rows(suite, run)]
        else:
            rows += _stored_rows(suite, local_copy(source), notes)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    frame.attrs["notes"] = notes
    return frame if parts else frame[frame["part"].isna()].reset_index(drop=True)


def _stored_rows(suite: Suite, place: Path, notes: list[str]) -> Iterator[Row]:
    perplexities = sorted(place.rglob(store.PERPLEXITY)) if place.is_dir() else []
    if place.name == store.PERPLEXITY:
        found, perplexities = Found(), [place]
    else:
        scored = not perplexities or any(store.is_result(file) for file in place.rglob("*.json"))
        found = store.find([place]) if scored else Found()
    notes += found.notes
    for result in found.results:
        yield from _result_rows(suite, result)
    for one in found.missing:
        yield _missing_row(suite, one)
    for file in perplexities:
        try:
            yield from _perplexity_rows(store.read_perplexity(file), file)
        except UserError as error:
            if file == place:
                raise
            notes.append(f"{error} (set aside)")


def _run_rows(suite: Suite, run: RunResult) -> Iterator[Row]:
    for result in run.results.values():
        yield from _result_rows(suite, result)
    for one in run.missing:
        yield _missing_row(suite, one)
    unfinished = f"not trained to its end: {run.unfinished}" if run.unfinished else ""
    if run.measured is not None:
        for row in _perplexity_rows(run.measured, run.measured_file):
            yield row | {"notes": "; ".join(filter(None, (row["notes"], unfinished)))}
    if run.status.perplexity is not None:
        shown = {"task": "validation", "metric": "perplexity", "value": run.status.perplexity, "notes": unfinished}
        yield shown | {"file": str(run.folder / METRICS)}


def _of_run(run: RunResult, row: Row) -> Row:
    counts = count(run.plan)
    sizes = {"activated": counts.activated, "total": counts.total}
    return (
        sizes | row | {"model": f"{run.model}-{run.setting}", "setting": run.setting, "seed": run.seed, "run": run.name}
    )


def _model(model: dict[str, Any]) -> Row:
    keys = ("activated", "total", "checkpoint", "fingerprint")
    return {"model": model["name"], **{key: model.get(key) for key in keys}}


def _result_rows(suite: Suite, result: Result) -> Iterator[Row]:
    spec = suite.tasks.get(result.settings.task)
    reasons = [*settings_mismatch(suite, result.settings), *reasons_of(suite, spec, result)] if spec else []
    common = _model(result.model) | {
        "task": result.settings.task,
        "shots": result.settings.shots,
        "file": str(result.path),
    }
    common["notes"] = "; ".join(reason + (f": {detail}" if detail else "") for reason, detail in reasons)
    yield from _score_rows(result.scores, common | {"n": result.questions})
    for subject, scores in result.subject_scores.items():
        yield from _score_rows(scores, common | {"part": subject, "n": scores.get("questions")})


def _score_rows(scores: dict[str, float | None], common: Row) -> Iterator[Row]:
    for metric, value in scores.items():
        if not metric.endswith("_stderr") and metric != "questions":
            yield common | {"metric": metric, "value": value, "stderr": scores.get(f"{metric}_stderr")}


def _missing_row(suite: Suite, one: Missing) -> Row:
    metric = suite.tasks[one.task].metric if one.task in suite.tasks else None
    return _model(one.model) | {
        "task": one.task,
        "metric": metric,
        "notes": f"{one.task} was unavailable: {one.reason}",
    }


def _perplexity_rows(content: dict[str, Any], file: Path) -> Iterator[Row]:
    common = {"model": file.parent.name, "task": "perplexity", "notes": "", "file": str(file)}
    common |= _model(content["model"]) if "model" in content else {}
    if limit := content["settings"].get("limit"):
        size = content["settings"].get("batch_size", "unknown size")
        common["notes"] = f"run with --limit {limit} (batches of {size})"
    for part, entry in {None: content[store.TOTAL], **content.get("domains", {})}.items():
        for metric in ("perplexity", "loss"):
            if metric in entry:
                yield common | {"part": part, "metric": metric, "value": entry[metric], "n": entry.get("tokens")}


def load_curves(path: Source | Sequence[Source], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The metrics of training: one row for each run and logged batch.

    Args:
        path: the folder of a launched sweep, a run folder, or a folder of run folders; or several.
        metrics: names or patterns to keep, such as ``loss/train/*``; default: all (thousands of columns where routing is logged).

    Returns:
        A frame with ``model``, ``setting``, ``seed``, ``run`` (as in :func:`load`), ``batch``, ``tokens``, and a column for each
        metric under its name in `metrics.jsonl`, missing where it was not logged. ``frame.attrs["notes"]`` lists lines that
        can't be read; each is also a warning.

    Raises:
        UserError: no metrics there.
    """
    notes: list[str] = []
    frames = []
    for source in [path] if isinstance(path, (str, Path)) else path:
        refuse_remote(source, "the run folder", "copy it here first (aws s3 sync s3://... FOLDER)")
        for about, folder in _runs(Path(source)):
            lines = pd.DataFrame(read_metrics(folder / METRICS, notes))
            if lines.empty:
                continue
            names = [name for name in lines.columns if name not in ("batch", "tokens")]
            if metrics is not None:
                names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in metrics)]
            lines = lines[["batch", "tokens", *names]].dropna(how="all", subset=names)
            frames.append(pd.concat([pd.DataFrame(about, index=lines.index), lines], axis=1))
    if not frames:
        raise UserError(f"{path} holds no {METRICS} with a line in it; give a run folder, or the folder of a sweep")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    frame = pd.concat(frames, ignore_index=True).astype({name: COLUMNS[name] for name in RUN_COLUMNS})
    frame.attrs["notes"] = notes
    return frame


def _runs(path: Path) -> Iterator[tuple[Row, Path]]:
    """What identifies each run under ``path``, and its folder."""
    if is_sweep([path]):
        for name, entry in SweepFolder(path).runs.items():
            model = f"{entry['model']}-{entry['setting']}"
            yield {"model": model, "setting": entry["setting"], "seed": entry["seed"], "run": name}, path / name
        return
    for file in sorted(path.rglob(METRICS)):
        record = read_record(file.parent)
        data = record.data if record else {}
        model = data.get("plan", {}).get("name")
        yield {"model": model, "setting": None, "seed": data.get("seed"), "run": file.parent.name}, file.parent
