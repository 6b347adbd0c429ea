"""The store of results: `OUT/<model>/<task>.json`, one file per checkpoint and task.

A file is lm-eval's own JSON plus one key, `mohd_train`, that says where the numbers come from::

    {"format", "settings": {task, shots, metric, limit, rows, ...}, "model": {name, checkpoint, fingerprint, ...},
     "scores": {"acc": 0.31, "acc_stderr": 0.01, ...}, "questions", "truncated", "joined", "versions", "hardware", "date"}

A task whose questions were unavailable leaves `<task>.missing.json` with the reason; `perplexity.json` holds the validation
perplexity per domain. A file that can't be read is named and set aside, never counted.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mohd_train.checkpoint.identity import is_sampled
from mohd_train.errors import UserError
from mohd_train.results.suite import Suite, TaskSpec, load_suite
from mohd_train.utils.environment import now, versions
from mohd_train.utils.files import write_output

KEY = "mohd_train"
FORMAT = "mohd_train.evaluation/1"
MISSING_FORMAT = "mohd_train.evaluation.missing/1"
PERPLEXITY_FORMAT = "mohd_train.perplexity/1"
PERPLEXITY = "perplexity.json"
TOTAL = "total"  # of a perplexity result: all domains, every token alike
PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers")  # what decides a score


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
    demo: bool = False  # questions written for the demo, not the task's own
    tokenizer: str = ""  # its hash (checkpoint.identity); empty in older results
    dropped: str = ""  # tokens that the tokenizer appends to a text, and that were left out


@dataclass(frozen=True)
class Result:
    """One stored result.

    Attributes:
        model: ``name``, ``checkpoint``, ``fingerprint``, ``activated``, ``total``, ... ; ``unfinished`` if its run had not ended.
        scores: fractions, such as ``acc``, ``acc_stderr``, ``acc_norm``; of a group also ``acc_macro``.
        subjects: how many were asked; 0 for a task that is not a group.
        joined: requests whose answer shares a token with its question; empty in older results.
        subject_scores: subject -> scores, of a group.
        by_seed: run -> the metric, where this is the mean over models that differ by seed.
    """

    path: Path
    settings: Settings
    model: dict[str, Any]
    scores: dict[str, float | None]
    questions: int
    truncated: dict[str, int]  # requests, of, tokens, longest
    subjects: int
    lm_eval_results: dict[str, Any]
    joined: dict[str, int] = field(default_factory=dict)  # requests, alone
    subject_scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    by_seed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """A task whose questions were unavailable when a checkpoint was evaluated."""

    task: str
    model: dict[str, Any]
    reason: str


@dataclass
class Found:
    """What a store holds. ``notes`` name the files that can't be read, which are set aside."""

    results: list[Result] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settings_mismatch(suite: Suite, settings: Settings) -> list[tuple[str, str]]:
    """(reason, detail) why a result doesn't belong in the suite's column: other shots, another version of the harness."""
    spec, found = suite.tasks[settings.task], []
    if settings.shots != spec.shots:
        found.append(("other shots", f"{settings.task} {settings.shots}, not {spec.shots}"))
    if settings.lm_eval != suite.lm_eval:
        found.append((f"another harness version than lm-eval {suite.lm_eval}", f"{settings.task} {settings.lm_eval}"))
    return found


def scores_of(raw: dict[str, Any], task: str) -> dict[str, float | None]:
    """``{"acc": 0.5, "acc_stderr": 0.01, "acc_norm": ...}`` from lm-eval's results; a standard error may be None.

    For a group, lm-eval's mean gives every question the same weight (micro); ``acc_macro`` gives every subject the same.
    """
    return {**_named(raw["results"][task]), **_macro(subjects_of(raw, task))}


def subjects_of(raw: dict[str, Any], task: str) -> dict[str, dict[str, float | None]]:
    """Subject -> its scores and number of ``questions``, from lm-eval's results of a group; empty for a single task."""
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
    """Mean over subjects and its standard error, as lm-eval computes them for a group with ``weight_by_size: false``."""
    values = [value for one in subjects.values() if (value := one.get("acc")) is not None]
    errors = [value for one in subjects.values() if (value := one.get("acc_stderr")) is not None]
    if not values or len(values) < len(subjects):
        return {}
    error = math.sqrt(sum(error**2 for error in errors)) / len(errors) if len(errors) == len(values) else None
    return {"acc_macro": sum(values) / len(values), "acc_macro_stderr": error}


def record(
    spec: TaskSpec, settings: Settings, model: dict[str, Any], raw: dict[str, Any], **about: Any
) -> dict[str, Any]:
    """The JSON of one result. ``about``: truncated, joined, files, absent subjects, seconds, device, hardware, batch size."""
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
        "versions": versions(PACKAGES),
        "date": now(),
    }
    return {KEY: ours, **raw}


def write(path: Path, data: dict[str, Any], default: Callable[[Any], Any] = str) -> None:
    """Writes a result file atomically; ``default`` as :func:`json.dumps` takes it. Raises UserError if it can't be written."""
    write_output(path, json.dumps(data, indent=1, ensure_ascii=False, default=default) + "\n")


def check_writable(folder: Path) -> None:
    """Creates the folder and checks that it is writable, before hours of work rather than after. Raises UserError if it isn't."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write results to {folder} ({error.strerror}); choose another --output") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"no permission to write results to {folder}; choose another --output")


def read(path: Path) -> Result:
    """One result file.

    Raises:
        UserError: it is missing, not JSON, or not a result of this store.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no results at {path}; mohd eval writes them") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); run the evaluation again or remove the file") from None
    ours = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        raise UserError(f"{path} is not a result of mohd eval (key {KEY}.format must be {FORMAT!r})")
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
        raise UserError(f"{path} is an incomplete result ({error}); run the evaluation again") from None


def _model(ours: dict[str, Any]) -> dict[str, Any]:
    """The model of a result. Raises KeyError if an identifying field is missing."""
    model = ours["model"]
    for key in ("name", "fingerprint", "checkpoint", "activated", "total"):
        model[key]
    return dict(model)


def find(paths: Iterable[Path]) -> Found:
    """Everything in the given files and, recursively, folders.

    Raises:
        UserError: a path that doesn't exist, a folder without results, or a file given by name that can't be read.
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
            raise UserError(f"{path} holds no results; mohd eval --output writes them")
        found.missing += read_missing(path, found.notes) if path.is_dir() else []
    return found


def missing_path(folder: Path, task: str) -> Path:
    """The file that says why the model in ``folder`` has no result for ``task``."""
    return folder / f"{task}.missing.json"


def write_missing(folder: Path, task: str, model: dict[str, Any], reason: str) -> Path | None:
    """Stores the reason and returns its file; does nothing if the task already has a result."""
    if (folder / f"{task}.json").exists():
        return None
    ours = {"format": MISSING_FORMAT, "task": task, "reason": reason, "model": model, "date": now()}
    write(missing_path(folder, task), {KEY: ours})
    return missing_path(folder, task)


def read_missing(folder: Path, notes: list[str]) -> list[Missing]:
    """The stored reasons under ``folder`` for tasks without a result; a broken file is named in ``notes``."""
    found = []
    for file in sorted(folder.rglob("*.missing.json")):
        if file.with_name(file.name.replace(".missing.json", ".json")).exists():  # on object storage the reason stays
            continue
        try:
            ours = json.loads(file.read_text(encoding="utf-8"))[KEY]
            found.append(Missing(ours["task"], _model(ours), str(ours["reason"])))
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{file} cannot be read ({error}) (set aside)")
    return found


def read_perplexity(path: Path) -> dict[str, Any]:
    """The content of a ``perplexity.json``: ``settings``, ``model``, ``total`` and ``domains`` of {tokens, nll, loss, perplexity}.

    Raises:
        UserError: it is missing, not JSON, or not a perplexity result.
    """
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))[KEY]
        if ours["format"] != PERPLEXITY_FORMAT:
            raise ValueError(f"unknown format {ours['format']!r}")
        ours["settings"], ours[TOTAL]["perplexity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a perplexity result ({error}); evaluate again") from None
    return dict(ours)


def set_aside(path: Path) -> str | None:
    """Renames a stored result that can't be read to `<name>.broken`. Returns a message, or None if nothing was wrong."""
    if not path.exists():
        return None
    try:
        read(path)
    except UserError as error:
        return rename_broken(path, str(error))
    return None


def rename_broken(path: Path, why: str) -> str:
    """Renames `<name>` to `<name>.broken`. Returns a message about it."""
    broken = path.with_name(f"{path.name}.broken")
    path.replace(broken)
    return f"{why.partition(';')[0]}: set aside as {broken.name}, evaluated again"


@functools.cache
def _task_names() -> frozenset[str]:
    return frozenset(load_suite().tasks)


def is_result(path: Path) -> bool:
    """Whether a file in a results folder should be read: a result of this store, or a broken file in the place of one, which
    must be reported.

    Hidden files, reasons for missing results and other JSON files are not results, unless they are named after a task.
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
    """The stored result at ``path`` if it is this same measurement; None if there is none or it may be overwritten.

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
            f"{path} was made with other settings ({'; '.join(differing)}); choose another --output or give --overwrite"
        )
    return stored


def check_same_checkpoint(path: Path, model: dict[str, Any], fingerprint: str) -> None:
    """Raises UserError if the stored result at ``path`` is another checkpoint's, or isn't known to be this one's."""
    if is_sampled(model["fingerprint"]):
        raise UserError(
            f"{path} was stored by an earlier version, which did not look at all weights and the tokenizer, so it may be "
            "another checkpoint's; give --overwrite to measure again"
        )
    if model["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} holds the result of another checkpoint ({model['checkpoint']}); "
            "choose another --output or --name, or give --overwrite"
        )
