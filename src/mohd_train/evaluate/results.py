"""The store of results: `OUT/<model>/<task>.json`, one file a checkpoint and task.

A file is lm-eval's own JSON with one more key, `mohd_train`, that says where the numbers come from: the model and its
checkpoint, shots, metric, limit, rows, truncated requests, versions, hardware. A task whose rows could not be had leaves
`<task>.missing.json` with the reason. A file that cannot be read is named and set aside, never counted.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.metrics import unweighted_mean_stderr
from lm_eval.utils import handle_non_serializable

import mohd_train
from mohd_train.checkpoint.identity import is_sampled
from mohd_train.errors import UserError
from mohd_train.evaluate.suite import Suite, TaskSpec, load_suite
from mohd_train.evaluate.text_file import write_text

KEY = "mohd_train"
FORMAT = "mohd_train.evaluation/1"
MISSING_FORMAT = "mohd_train.evaluation.missing/1"
_PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers")


@dataclass(frozen=True)
class Settings:
    """How a task was asked. Two results with the same settings and checkpoint are the same measurement."""

    task: str
    shots: int
    metric: str
    seed: int
    limit: int | None
    lm_eval: str  # version
    bos: str  # auto | yes | no
    dtype: str
    rows: str  # "hub", or a hash over the local files
    demo: bool = False  # rows written for the demo, not the task's own
    tokenizer: str = ""  # its hash (checkpoint.identity); empty in results stored before it was kept
    dropped: str = ""  # tokens that the tokenizer appends to a text, and that were left out


@dataclass(frozen=True)
class Result:
    """One stored result."""

    path: Path
    settings: Settings
    model: dict[str, Any]
    scores: dict[str, float | None]  # metric -> value, metric_stderr -> value
    questions: int
    truncated: dict[str, int]  # requests, of, tokens, longest
    subjects: int  # of a group
    lm_eval_results: dict[str, Any]
    joined: dict[str, int] = field(default_factory=dict)  # requests, alone; empty in results older than the count
    subject_scores: dict[str, dict[str, float | None]] = field(default_factory=dict)  # of a group: subject -> acc, ...
    by_seed: dict[str, float] = field(
        default_factory=dict
    )  # of a mean over models that differ by seed: run -> the metric


@dataclass(frozen=True)
class Missing:
    """A task whose rows could not be had when a checkpoint was evaluated."""

    task: str
    model: dict[str, Any]
    reason: str


@dataclass
class Found:
    """What a store holds. ``notes`` name the files that cannot be read, which are set aside."""

    results: list[Result] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def asked_otherwise(suite: Suite, settings: Settings) -> list[tuple[str, str]]:
    """(reason, detail) why a result cannot stand in the suite's column: other shots, another version of the harness."""
    spec, found = suite.tasks[settings.task], []
    if settings.shots != spec.shots:
        found.append(("other shots", f"{settings.task} {settings.shots}, not {spec.shots}"))
    if settings.lm_eval != suite.lm_eval:
        found.append((f"another harness version than lm-eval {suite.lm_eval}", f"{settings.task} {settings.lm_eval}"))
    return found


def versions() -> dict[str, str]:
    """Of this project, Python and the packages that decide a score."""
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"mohd_train": mohd_train.__version__, "python": platform.python_version(), **found}


def hardware() -> str:
    """The device, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def scores_of(raw: dict[str, Any], task: str) -> dict[str, float | None]:
    """``{"acc": 0.5, "acc_stderr": 0.01, "acc_norm": ...}`` of lm-eval's results; a standard error may be None.

    Of a group, lm-eval's mean weighs every question the same (micro); ``acc_macro`` weighs every subject the same.
    """
    return {**_named(raw["results"][task]), **_macro(subjects_of(raw, task))}


def subjects_of(raw: dict[str, Any], task: str) -> dict[str, dict[str, float | None]]:
    """Subject -> its scores and number of ``questions``, of lm-eval's results of a group; nothing for a task of its own."""
    leaves = [name for name in raw.get("n-samples", {}) if name != task and name in raw["results"]]
    return {
        name.removeprefix(f"{task}_"): {
            **_named(raw["results"][name]),
            "questions": float(raw["n-samples"][name]["effective"]),
        }
        for name in leaves
    }


def _named(entry: dict[str, Any]) -> dict[str, float | None]:
    named = {key.partition(",")[0]: value for key, value in entry.items() if "," in key}
    return {key: float(value) if isinstance(value, (int, float)) else None for key, value in named.items()}


def _macro(subjects: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """Mean over subjects with its standard error, as lm-eval has them for a group with ``weight_by_size: false``."""
    values = [value for one in subjects.values() if (value := one.get("acc")) is not None]
    errors = [value for one in subjects.values() if (value := one.get("acc_stderr")) is not None]
    if not values or len(values) < len(subjects):
        return {}
    error = float(unweighted_mean_stderr(errors)) if len(errors) == len(values) else None
    return {"acc_macro": sum(values) / len(values), "acc_macro_stderr": error}


def record(
    spec: TaskSpec, settings: Settings, model: dict[str, Any], raw: dict[str, Any], **about: Any
) -> dict[str, Any]:
    """The JSON of one result. ``about``: truncated, joined, files, absent, seconds, device, batch_size."""
    samples = raw["n-samples"]
    ours = {
        "format": FORMAT,
        "settings": asdict(settings),
        "model": model,
        "scores": scores_of(raw, spec.name),
        "subject_scores": subjects_of(raw, spec.name),
        "questions": sum(entry["effective"] for entry in samples.values()),
        "questions_available": sum(entry["original"] for entry in samples.values()),
        "subjects": len(samples) if spec.subjects else 0,
        **about,
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {KEY: ours, **raw}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a result whole, or not at all."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, default=handle_non_serializable) + "\n")


def check_writable(folder: Path) -> None:
    """Makes the folder and sees that results can be put there: before hours of work, not after. Raises :class:`UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write results to {folder} ({error.strerror}); choose another --output") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"no permission to write results to {folder}; choose another --output")


def read(path: Path) -> Result:
    """One result file.

    Raises:
        UserError: it is missing, no JSON, or not of this store.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no results at {path}; eval/run_eval.py writes them") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON ({error}); run the evaluation again or remove the file") from None
    ours = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        raise UserError(f"{path} is no result of eval/run_eval.py (key {KEY}.format must be {FORMAT!r})")
    try:
        settings, scores = Settings(**ours["settings"]), ours["scores"]
        subjects = subjects_of(data, settings.task)
        return Result(
            path=path,
            settings=settings,
            model=_model(ours),
            scores=_macro(subjects)
            | {str(name): value if value is None else float(value) for name, value in scores.items()},
            questions=ours["questions"],
            truncated=ours["truncated"],
            subjects=ours["subjects"],
            lm_eval_results=data["results"],
            joined=ours.get("joined", {}),
            subject_scores=subjects,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} lacks a part of a result ({error}); run the evaluation again") from None


def _model(ours: dict[str, Any]) -> dict[str, Any]:
    """The model of a result, if it says who it is."""
    model = ours["model"]
    for key in ("name", "fingerprint", "checkpoint", "activated", "total"):
        model[key]
    return dict(model)


def find(paths: Iterable[Path]) -> Found:
    """Everything in the given files and, recursively, folders.

    Raises:
        UserError: a path that is not there, a folder without results, or a file, given by its own name, that cannot be read.
    """
    found, seen = Found(), set()
    for path in paths:
        files = [path] if not path.is_dir() else sorted(p for p in path.rglob("*.json") if is_result(p))
        for file in files:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                found.results.append(read(file))
            except UserError as error:
                if file == path:
                    raise
                found.notes.append(f"{error} (set aside)")
        if not files:
            raise UserError(f"{path} holds no results; eval/run_eval.py --output writes them")
        found.missing += read_missing(path, found.notes) if path.is_dir() else []
    return found


def missing_path(folder: Path, task: str) -> Path:
    """Where the reason is kept why a model in ``folder`` has no result for ``task``."""
    return folder / f"{task}.missing.json"


def write_missing(folder: Path, task: str, model: dict[str, Any], reason: str) -> Path | None:
    """Keeps the reason, in the file that is returned; a result that is stored there already stands, and nothing is written."""
    if (folder / f"{task}.json").exists():
        return None
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    ours = {"format": MISSING_FORMAT, "task": task, "reason": reason, "model": model, "date": when}
    write_json(missing_path(folder, task), {KEY: ours})
    return missing_path(folder, task)


def read_missing(folder: Path, notes: list[str]) -> list[Missing]:
    """The reasons kept under ``folder`` for what has no result; a broken file is named in ``notes``."""
    found = []
    for file in sorted(folder.rglob("*.missing.json")):
        if file.with_name(file.name.replace(".missing.json", ".json")).exists():  # object storage keeps the reason
            continue
        try:
            ours = json.loads(file.read_text(encoding="utf-8"))[KEY]
            found.append(Missing(ours["task"], _model(ours), str(ours["reason"])))
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{file} cannot be read ({error}) (set aside)")
    return found


def set_aside(path: Path) -> str | None:
    """Renames a stored result that cannot be read to `<name>.broken`. Returns what was done; None where nothing was wrong."""
    if not path.exists():
        return None
    try:
        read(path)
    except UserError as error:
        return rename_broken(path, str(error))
    return None


def rename_broken(path: Path, why: str) -> str:
    """`<name>` -> `<name>.broken`. Returns what was done, in words."""
    broken = path.with_name(f"{path.name}.broken")
    os.replace(path, broken)
    return f"{why.partition(';')[0]}: set aside as {broken.name}, evaluated again"


@functools.cache
def _task_names() -> frozenset[str]:
    return frozenset(load_suite().tasks)


def is_result(path: Path) -> bool:
    """Whether a file in a results folder is to be read: of this store, or where a result belongs and broken (it must be named).

    Not so: hidden files, reasons for missing results, and other JSON files, unless they have the name of a task.
    """
    if path.name.startswith(".") or path.name.endswith(".missing.json"):
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return True
    ours = data.get(KEY) if isinstance(data, dict) else None
    return (isinstance(ours, dict) and ours.get("format") == FORMAT) or path.stem in _task_names()


def reusable(path: Path, settings: Settings, fingerprint: str, overwrite: bool) -> Result | None:
    """The stored result at ``path`` if it is this very measurement; None if there is none (or it may be overwritten).

    Raises:
        UserError: the file holds another checkpoint's result, or one with other settings, and ``overwrite`` is off.
    """
    if not path.exists() or overwrite:
        return None
    stored = read(path)
    check_same_checkpoint(path, stored.model, fingerprint)
    before, now = asdict(stored.settings), asdict(settings)
    differing = [f"{key}: {before[key]} there, {now[key]} now" for key in now if before[key] != now[key]]
    if differing:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(differing)}); choose another --output or say --overwrite"
        )
    return stored


def check_same_checkpoint(path: Path, model: dict[str, Any], fingerprint: str) -> None:
    """Raises UserError where the stored result at ``path`` is another checkpoint's, or can't be known to be this one's."""
    if is_sampled(model["fingerprint"]):
        raise UserError(
            f"{path} was stored by an earlier version, which did not look at all weights and the tokenizer, so it may be "
            "another checkpoint's; say --overwrite to measure again"
        )
    if model["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} holds the result of another checkpoint ({model['checkpoint']}); "
            "choose another --output or --name, or say --overwrite"
        )
