"""The tasks of the evaluation: how each is asked, and its column in Table 2 (`eval/tasks.yaml`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mohd_train import resources
from mohd_train.errors import UserError
from mohd_train.utils.text import nearest

DEFAULT_SUITE = resources.root() / "eval" / "tasks.yaml"


@dataclass(frozen=True)
class TaskSpec:
    """One task of the table."""

    name: str  # lm-eval's name
    shots: int
    metric: str  # the one the table shows
    column: str  # its header in the table
    group: str
    folder: str  # of the stock task, under lm_eval/tasks
    questions: int  # in the whole evaluation split
    paper: str = ""  # key in the paper's results; default: name
    subjects: int = 0  # number of sub-tasks; 0: not a group

    @property
    def paper_key(self) -> str:
        """The task's key in the paper's results."""
        return self.paper or self.name


@dataclass(frozen=True)
class Suite:
    """All tasks, in the table's order, and the harness version they are meant for."""

    tasks: dict[str, TaskSpec]
    lm_eval: str
    seed: int

    def select(self, names: Sequence[str] | None) -> list[TaskSpec]:
        """The named tasks in the suite's order; all of them if there are no names.

        Raises:
            UserError: an unknown name; suggests the nearest.
        """
        if not names:
            return list(self.tasks.values())
        for name in names:
            if name not in self.tasks:
                raise UserError(f"unknown task {name!r}{nearest(name, self.tasks)}; known: {', '.join(self.tasks)}")
        return [spec for name, spec in self.tasks.items() if name in names]


def load_suite(path: Path = DEFAULT_SUITE) -> Suite:
    """Reads the task file.

    Raises:
        UserError: it is missing or not YAML, or an entry has an unknown, missing or wrong key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no task file at {path}; it is part of the repository (eval/tasks.yaml)") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        tasks = {name: _task(path, name, entry) for name, entry in data["tasks"].items()}
        return Suite(tasks, lm_eval=str(data["lm_eval"]), seed=int(data["seed"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: needs the keys lm_eval, seed and tasks ({error})") from None


def _task(path: Path, name: str, entry: dict[str, Any]) -> TaskSpec:
    fields = {field.name: field for field in dataclasses.fields(TaskSpec) if field.name != "name"}
    types = {key: {"int": int, "str": str}[str(field.type)] for key, field in fields.items()}
    for key, value in entry.items():
        if key not in fields:
            raise UserError(f"{path}: unknown key {key!r} in task {name!r}{nearest(key, fields)}")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise UserError(f"{path}: {key} of task {name!r} is {value!r}; it must be of type {types[key].__name__}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in entry]
    if missing:
        raise UserError(f"{path}: task {name!r} lacks {', '.join(missing)}")
    if entry["shots"] < 0:
        raise UserError(f"{path}: shots of task {name!r} is {entry['shots']}; it must be 0 or more")
    return TaskSpec(name=name, **entry)
