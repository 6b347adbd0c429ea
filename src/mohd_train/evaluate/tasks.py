"""lm-eval's stock tasks with the paper's shots, on rows from the hub or from local files.

Local files change nothing but where the rows come from: prompts, answers, processing and metrics are those of lm-eval's own
YAML, which is loaded with `dataset_path: json`. That also works for the hub's script data sets (logiqa), which current versions
of `datasets` refuse to run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from mohd_train.errors import UserError
from mohd_train.evaluate.rows import RowFile, check_file
from mohd_train.results.suite import TaskSpec
from mohd_train.utils.text import nearest

_STOCK = Path(lm_eval.tasks.__file__).parent
_GROUP_KEYS = {entry.name for entry in dataclasses.fields(GroupConfig)}


@dataclass
class BuiltTask:
    """A task (or a group of tasks) with its questions and their source."""

    spec: TaskSpec
    item: Task | Group
    files: dict[str, RowFile] = field(
        default_factory=dict
    )  # "<subject>/<split>" or "<split>" -> file; empty: from the hub
    absent: list[str] = field(default_factory=list)  # subjects that the local folder lacks

    @property
    def leaves(self) -> list[Task]:
        """The tasks that hold questions: itself, or a group's subjects."""
        return self.item.get_all_tasks() if isinstance(self.item, Group) else [self.item]


def stock_manager(specs: list[TaskSpec]) -> TaskManager:
    """An index of only the stock tasks that ``specs`` need (indexing all of lm-eval takes many seconds)."""
    folders = sorted({str(_STOCK / spec.folder) for spec in specs})
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(
                f"lm-eval has no task folder {folder}; `folder` in eval/tasks.yaml and the installed version differ"
            )
    return TaskManager(include_defaults=False, include_path=folders)


def build_task(spec: TaskSpec, manager: TaskManager, data_dir: Path | None, cache_dir: Path | None = None) -> BuiltTask:
    """The stock task of ``spec`` with its shots.

    Args:
        data_dir: holds `<task>/<split>.jsonl` (`mmlu/<subject>/<split>.jsonl`); None: rows come from the hub.
        cache_dir: where `datasets` keeps the converted local rows; must outlive the task.

    Raises:
        UserError: a local file that is missing, empty, too short for the shots, or has a bad row; rows that are unavailable
            from the hub.
    """
    built = _from_hub(spec, manager) if data_dir is None else _from_files(spec, manager, data_dir, cache_dir)
    for task in built.leaves:
        task.set_config("num_fewshot", spec.shots)
    return built


def _from_hub(spec: TaskSpec, manager: TaskManager) -> BuiltTask:
    try:
        loaded = manager.load([spec.name])
    except Exception as error:  # the hub, the network and `datasets` raise exceptions of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"the rows of task {spec.name} are not available from the hub: {reason}; give them with --data-dir"
        ) from error
    return BuiltTask(spec, loaded.get("groups", {}).get(spec.name) or loaded["tasks"][spec.name])


def _from_files(spec: TaskSpec, manager: TaskManager, data_dir: Path, cache_dir: Path | None) -> BuiltTask:
    folder = data_dir / spec.name
    if not folder.is_dir():
        raise UserError(f"no folder {folder} for task {spec.name}; it must hold <split>.jsonl (see docs/evaluation.md)")
    if not spec.subjects:
        task, files = _local_task(spec, manager, spec.name, folder, cache_dir)
        return BuiltTask(spec, task, files)
    subjects = subject_tasks(spec.name, manager)
    present = {path.name for path in folder.iterdir() if path.is_dir()}
    for name in sorted(present - set(subjects)):
        raise UserError(f"{folder / name}: {spec.name} has no subject {name!r}{nearest(name, subjects)}")
    if not present:
        raise UserError(f"{folder} holds no subjects; each is a folder with <split>.jsonl")
    built = BuiltTask(spec, Group(spec.name), absent=sorted(set(subjects) - present))
    built.item = _local_group(built, manager, spec.name, {subjects[name]: folder / name for name in present}, cache_dir)
    return built


def _local_task(
    spec: TaskSpec, manager: TaskManager, name: str, folder: Path, cache_dir: Path | None
) -> tuple[Task, dict[str, RowFile]]:
    """The stock task ``name`` with its rows replaced by those of ``folder``."""
    config = stock_config(manager, name)
    evaluated = config.get("test_split") or config["validation_split"]
    drawn = (
        (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split") or config.get("training_split")
    )
    needed = [evaluated, *([drawn] if drawn and spec.shots else [])]
    for split in needed:
        if not (folder / f"{split}.jsonl").is_file():
            use = "questions" if split == evaluated else f"{spec.shots} shots"
            raise UserError(f"no file {folder / f'{split}.jsonl'}; task {spec.name} takes its {use} from it")
    splits = [split for split in ("train", "dev", "validation", "test") if (folder / f"{split}.jsonl").is_file()]
    files = {split: check_file(folder / f"{split}.jsonl", spec.name) for split in splits}
    if drawn and spec.shots and files[drawn].rows < spec.shots:
        raise UserError(
            f"{files[drawn].path} holds {files[drawn].rows} rows; task {spec.name} draws {spec.shots} shots from it"
        )
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) and config[key] not in splits:
            config[key] = None  # not read for these shots, but lm-eval would open it anyway
    config.pop("dataset_name", None)
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": {split: str(files[split].path) for split in splits}}
    if cache_dir is not None:
        config["dataset_kwargs"]["cache_dir"] = str(cache_dir)
    return ConfigurableTask(config=config), files


def stock_config(manager: TaskManager, name: str) -> dict[str, Any]:
    """lm-eval's own YAML of a task, with includes and functions resolved. Raises UserError if it has none."""
    path = manager.task_index[name].yaml_path
    if path is None:
        raise UserError(f"lm-eval's task {name} has no YAML of its own; local rows cannot be given to it")
    config = load_yaml(path, resolve_func=True)
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}


def _children(manager: TaskManager, name: str) -> list[str]:
    """Names of a group's direct members; a tag is replaced by its tasks."""
    path = manager.task_index[name].yaml_path
    assert path is not None, f"the group {name} has no YAML"
    names = []
    for child in load_yaml(path)["task"]:
        entry = manager.task_index[child]
        names.extend(sorted(entry.tags) if entry.kind == Kind.TAG else [child])
    return names


def subject_tasks(name: str, manager: TaskManager) -> dict[str, str]:
    """Subject (its folder, the hub's configuration name) -> lm-eval's task name, for every task of a group."""
    if manager.task_index[name].kind != Kind.GROUP:
        return {stock_config(manager, name)["dataset_name"]: name}
    return {
        subject: task for child in _children(manager, name) for subject, task in subject_tasks(child, manager).items()
    }


def _local_group(
    built: BuiltTask, manager: TaskManager, name: str, folders: dict[str, Path], cache_dir: Path | None
) -> Group:
    """The stock group ``name`` with those of its tasks that have a folder; fills ``built.files``."""
    path = manager.task_index[name].yaml_path
    assert path is not None, f"the group {name} has no YAML"
    group = Group.from_config({key: value for key, value in load_yaml(path).items() if key in _GROUP_KEYS})
    for child in _children(manager, name):
        if manager.task_index[child].kind == Kind.GROUP:
            sub_group = _local_group(built, manager, child, folders, cache_dir)
            if len(sub_group):
                group.add(sub_group)
        elif child in folders:
            task, files = _local_task(built.spec, manager, child, folders[child], cache_dir)
            group.add(task)
            built.files.update({f"{folders[child].name}/{split}": file for split, file in files.items()})
    return group
