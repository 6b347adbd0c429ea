"""Reads local questions, `DIR/<task>/<split>.jsonl`, and checks them against what lm-eval's task expects of a row.

A row that lacks a field, or holds a value that the task can't use, would otherwise end in a traceback from inside a
template, or worse, in a prompt that says "None". `DIR/manifest.json` says where mohd prefetch took the rows from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.files import write_output

FORMAT = "mohd_train.task_rows/1"
MANIFEST = "manifest.json"
Check = Callable[[dict[str, Any]], str | None]  # what is wrong with a row, or None


@dataclass(frozen=True)
class RowFile:
    """One checked file of rows."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class Schema:
    """The fields of a task's rows, and what must hold between them."""

    fields: dict[str, type | tuple[type, ...]]
    check: Check = lambda row: None

    def problem(self, row: Any) -> str | None:
        """What is wrong with ``row``, or None."""
        if not isinstance(row, dict):
            return f"a row must be an object, this is {type(row).__name__}"
        for name, kinds in self.fields.items():
            if name not in row:
                return f"field {name!r} is missing"
            if not isinstance(row[name], kinds):
                expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
                return f"field {name!r} is {type(row[name]).__name__}, must be {expected}"
        return self.check(row)


def _choices(texts: Any, field: str, at_least: int = 2) -> str | None:
    if (
        not isinstance(texts, list)
        or len(texts) < at_least
        or not all(isinstance(text, str) and text for text in texts)
    ):
        return f"field {field!r} must be a list of {at_least} or more texts"
    return None


def _arc(row: dict[str, Any]) -> str | None:
    choices = row["choices"]
    wrong = _choices(choices.get("text"), "choices.text") or _choices(choices.get("label"), "choices.label")
    if wrong:
        return wrong
    if len(choices["text"]) != len(choices["label"]):
        return "fields 'choices.text' and 'choices.label' differ in length"
    if row["answerKey"] not in choices["label"]:
        return f"field 'answerKey' is {row['answerKey']!r}, not one of the labels {choices['label']}"
    return None


def _hellaswag(row: dict[str, Any]) -> str | None:
    label = str(row["label"])
    if not (label.isdigit() and int(label) < len(row["endings"])):
        return f"field 'label' is {row['label']!r}, not an index into 'endings'"
    return _choices(row["endings"], "endings")


def _winogrande(row: dict[str, Any]) -> str | None:
    if "_" not in row["sentence"]:
        return "field 'sentence' has no blank '_'"
    return None if row["answer"] in ("1", "2") else f'field \'answer\' is {row["answer"]!r}, must be "1" or "2"'


def _logiqa(row: dict[str, Any]) -> str | None:
    if row["label"].strip() not in ("a", "b", "c", "d"):
        return f"field 'label' is {row['label']!r}, must be a, b, c or d"
    return _choices(row["options"], "options", at_least=4)


def _lambada(row: dict[str, Any]) -> str | None:
    head, _, last = row["text"].rpartition(" ")
    return None if head and last else "field 'text' must hold a context, a space and a last word"


def _mmlu(row: dict[str, Any]) -> str | None:
    if not 0 <= row["answer"] < 4:
        return f"field 'answer' is {row['answer']}, must be 0 to 3"
    return _choices(row["choices"], "choices", at_least=4)


def _binary(row: dict[str, Any]) -> str | None:
    return None if row["label"] in (0, 1) else f"field 'label' is {row['label']}, must be 0 or 1"


_ARC = Schema({"question": str, "choices": dict, "answerKey": str}, _arc)
SCHEMAS = {
    "sciq": Schema(
        dict.fromkeys(("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"), str)
    ),
    "piqa": Schema({"goal": str, "sol1": str, "sol2": str, "label": int}, _binary),
    "winogrande": Schema({"sentence": str, "option1": str, "option2": str, "answer": str}, _winogrande),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "hellaswag": Schema(
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)}, _hellaswag
    ),
    "logiqa": Schema({"context": str, "question": str, "options": list, "label": str}, _logiqa),
    "boolq": Schema({"passage": str, "question": str, "label": int}, _binary),
    "lambada_openai": Schema({"text": str}, _lambada),
    "mmlu": Schema({"question": str, "choices": list, "answer": int}, _mmlu),
}


def check_file(path: Path, task: str) -> RowFile:
    """Reads every row of ``path`` and checks it against the task's schema.

    Raises:
        UserError: the file is empty, or a line is not JSON or not a row of the task; the message names file, line and field.
    """
    schema, digest, count = SCHEMAS[task], hashlib.sha256(), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg}); each line must hold one JSON object"
                ) from None
            if wrong := schema.problem(row):
                raise UserError(f"{path}, line {number}: {wrong} (task {task})")
            count += 1
    if count == 0:
        raise UserError(f"{path} holds no rows; task {task} needs at least one")
    return RowFile(path, count, digest.hexdigest())


@dataclass(frozen=True)
class Entry:
    """One file in the manifest. ``revision`` is the commit; ``conversion``: it is of the hub's Parquet copy."""

    task: str
    split: str
    rows: int
    sha256: str
    dataset: str
    config: str | None
    revision: str
    conversion: bool


@dataclass
class RowsManifest:
    """``files``: path under DIR -> entry; ``missing``: place (``logiqa``, ``mmlu/astronomy``) -> why it was unavailable."""

    files: dict[str, Entry]
    missing: dict[str, str]

    def save(self, folder: Path) -> None:
        """Writes `DIR/manifest.json`."""
        about = {"format": FORMAT, "lm_eval": version("lm_eval"), "datasets": version("datasets")}
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        text = json.dumps({**about, "files": files, "missing": dict(sorted(self.missing.items()))}, indent=1)
        write_output(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> RowsManifest | None:
    """The manifest of a folder of rows; None if it has none (rows from elsewhere). Raises UserError for a broken one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        return RowsManifest({name: Entry(**entry) for name, entry in data["files"].items()}, dict(data["missing"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of mohd prefetch ({error}); remove it and fetch again") from None


def why_missing(folder: Path, task: str) -> str | None:
    """Why mohd prefetch could not fetch the rows of ``task``; None if the folder has them, or its manifest says nothing."""
    known = None if (folder / task).is_dir() else read_manifest(folder)
    missing = known.missing if known else {}
    return next((why for place, why in missing.items() if place.partition("/")[0] == task), None)
