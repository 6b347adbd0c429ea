"""Downloads the rows of the ten tasks from the hub into the layout that `--data-dir` reads, for machines without a network.

Data set, configuration and splits are those that lm-eval's stock tasks name. `DIR/manifest.json` has each file's number of rows,
hash, data set and revision, and the reason for each task that was unavailable.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from lm_eval.tasks import TaskManager

from mohd_train.errors import UserError
from mohd_train.evaluate.rows import MANIFEST, Entry, RowsManifest, check_file, read_manifest
from mohd_train.evaluate.tasks import stock_config, stock_manager, subject_tasks
from mohd_train.results.suite import Suite, TaskSpec
from mohd_train.utils.files import write_output

CONVERSION = "refs/convert/parquet"  # where the hub keeps a Parquet copy of what it could convert


@dataclass(frozen=True)
class Source:
    """Where the rows of one folder come from: of a task, or of a subject of one."""

    task: str
    place: str  # folder under DIR: "sciq", "mmlu/astronomy"
    dataset: str  # on the hub
    config: str | None
    splits: tuple[str, ...]


def sources(spec: TaskSpec, manager: TaskManager) -> list[Source]:
    """Where the stock task of ``spec`` takes its rows from; one source for each subject of a group."""
    tasks = subject_tasks(spec.name, manager) if spec.subjects else {"": spec.name}
    return [_source(spec, subject, stock_config(manager, name)) for subject, name in sorted(tasks.items())]


def _source(spec: TaskSpec, subject: str, config: dict[str, Any]) -> Source:
    named = [config.get(f"{part}_split") for part in ("training", "validation", "test", "fewshot")]
    named.append((config.get("fewshot_config") or {}).get("split"))
    splits = tuple(dict.fromkeys(split for split in named if split))
    place = f"{spec.name}/{subject}" if subject else spec.name
    return Source(spec.name, place, config["dataset_path"], config.get("dataset_name"), splits)


class Hub:
    """Rows from the Hugging Face hub. A data set's revision is looked up once, so that all its rows are of one commit."""

    def __init__(self) -> None:
        self._revisions: dict[tuple[str, str | None], str | UserError] = {}

    def revision(self, dataset: str, branch: str | None = None) -> str:
        """The commit at the head of a branch (None: the main one). Raises UserError if the hub doesn't answer."""
        key = dataset, branch
        if key not in self._revisions:
            try:
                info = huggingface_hub.HfApi().dataset_info(dataset, revision=branch)
                self._revisions[key] = str(info.sha)
            except Exception as error:  # the network and the hub raise exceptions of their own
                self._revisions[key] = UserError(f"{dataset}: {_line(error)}")
        known = self._revisions[key]
        if isinstance(known, UserError):
            raise known  # don't ask again for each of 57 subjects
        return known

    def rows(self, source: Source, revision: str | None) -> tuple[Mapping[str, datasets.Dataset], str, bool]:
        """Every split, the commit, and whether it is that of the Parquet copy.

        Args:
            revision: the commit on the main branch; None: its head.

        Raises:
            UserError: they are unavailable; says why in one line.
        """
        commit = revision or self.revision(source.dataset)
        try:
            return datasets.load_dataset(source.dataset, source.config, revision=commit), commit, False
        except Exception as error:
            if "scripts are no longer supported" not in str(error):
                raise UserError(f"{source.dataset}: {_line(error)}") from error
            script = _line(error)
        try:
            commit = self.revision(source.dataset, CONVERSION)
            return self._converted(source, commit), commit, True
        except Exception as error:
            raise UserError(
                f"{source.dataset}: {script}; nor is there a usable Parquet copy ({_line(error)})"
            ) from error

    def _converted(self, source: Source, commit: str) -> Mapping[str, datasets.Dataset]:
        """The splits of the Parquet copy, whose files are `<configuration>/<split>/<number>.parquet`."""
        listed = huggingface_hub.HfApi().list_repo_files(source.dataset, repo_type="dataset", revision=commit)
        names = sorted(name for name in listed if name.endswith(".parquet") and name.count("/") == 2)
        configs = sorted({name.split("/")[0] for name in names})
        # A single configuration is named `default` there
        config = configs[0] if len(configs) == 1 else source.config or "default"
        files = {}
        for split in source.splits:  # not `partial-<split>`, which holds the first rows only
            parts = [name for name in names if name.startswith(f"{config}/{split}/")]
            if not parts:
                raise UserError(f"it has no complete split {split} of {config}")
            files[split] = [
                huggingface_hub.hf_hub_download(source.dataset, name, repo_type="dataset", revision=commit)
                for name in parts
            ]
        return datasets.load_dataset("parquet", data_files=files)


def prefetch(folder: Path, suite: Suite, names: list[str], say: Callable[[str], None] = print) -> int:
    """Downloads what is missing; the manifest is updated after each task and subject.

    Args:
        names: tasks; empty: all.

    Returns:
        0, or 1 if a task or subject was unavailable (reported, and kept in the manifest with the reason).

    Raises:
        UserError: an unknown task, an unwritable folder, a file there that isn't in its manifest, or nothing was available.
    """
    specs = suite.select(names)
    manager, hub = stock_manager(specs), Hub()
    known = read_manifest(folder) or RowsManifest({}, {})
    wanted = [source for spec in specs for source in sources(spec, manager)]
    failed: dict[str, str] = {}
    datasets.disable_progress_bars()
    for number, source in enumerate(wanted, start=1):
        place = f"[{number}/{len(wanted)}] {source.place}"
        if all(_intact(folder, _name(source, split), known) for split in source.splits):
            say(f"{place}: there")
            continue
        try:
            say(f"{place}: {_fetch(folder, source, hub, known)}")
            known.missing.pop(source.place, None)
        except _NotHad as error:
            said = "the same" if str(error) in failed.values() else error
            known.missing[source.place] = failed[source.place] = str(error)
            say(f"{place}: – ({said})")
        known.save(folder)
    if len(failed) == len(wanted):
        raise UserError(f"nothing is available from the hub; the first answer was: {next(iter(failed.values()))}")
    return 1 if failed else 0


class _NotHad(Exception):
    """A task's rows are unavailable, or the task can't use them."""


def _fetch(folder: Path, source: Source, hub: Hub, known: RowsManifest) -> str:
    """Writes every split of one source and adds it to ``known``. Returns a message about it."""
    try:
        pinned = {e.revision for e in known.files.values() if e.dataset == source.dataset and not e.conversion}
        rows, commit, conversion = hub.rows(source, pinned.pop() if len(pinned) == 1 else None)
        lacking = [split for split in source.splits if split not in rows]
        if lacking:
            raise UserError(f"{source.dataset} has no split {', '.join(lacking)}; it has {', '.join(rows)}")
        texts = {split: _jsonl(rows[split]) for split in source.splits}
    except UserError as error:
        raise _NotHad(str(error)) from error
    said = []
    for split, text in texts.items():
        name = _name(source, split)
        digest = hashlib.sha256(text.encode()).hexdigest()
        _write(folder, name, text, digest, source.task, known)
        entry = Entry(source.task, split, len(rows[split]), digest, source.dataset, source.config, commit, conversion)
        known.files[name] = entry
        said.append(f"{split} {entry.rows:,}")
    copy = ", the Parquet copy" if conversion else ""
    return f"{', '.join(said)} rows · {source.dataset}@{commit[:8]}{copy}"


def _write(folder: Path, name: str, text: str, digest: str, task: str, known: RowsManifest) -> None:
    """Writes one file, once its rows have passed the task's checks."""
    path = folder / name
    if path.exists() and name not in known.files and _sha256(path) != digest:
        raise UserError(
            f"{path} exists, was not fetched into this folder, and differs from the hub's; choose another DIR"
        )
    fresh = path.with_name(f".{path.name}.new")  # checked before it gets its final name
    try:
        write_output(fresh, text)
        try:
            check_file(fresh, task)
        except UserError as error:
            raise _NotHad(str(error).replace(str(fresh), f"rows of {name}")) from error
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); complete files stay, fetch again") from None
    finally:
        fresh.unlink(missing_ok=True)


def verify(folder: Path, suite: Suite, names: list[str]) -> tuple[list[str], list[str]]:
    """(problems, remarks): files that are missing, changed or unknown; and what was unavailable, with the reason.

    Raises:
        UserError: an unknown task, or no manifest.
    """
    specs = suite.select(names)
    known = read_manifest(folder)
    if known is None:
        raise UserError(f"{folder} has no {MANIFEST}; mohd prefetch {folder} fetches rows into it")
    tasks = {spec.name for spec in specs}
    had = {entry.task for entry in known.files.values()}
    problems = [] if had & tasks else [f"{folder} holds no rows of {', '.join(spec.name for spec in specs)}"]
    for name, entry in known.files.items():
        if entry.task not in tasks:
            continue
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing")
        elif not _intact(folder, name, known):
            problems.append(f"{folder / name} has changed since it was fetched")
    present = sorted(path.relative_to(folder).as_posix() for task in tasks for path in (folder / task).rglob("*.jsonl"))
    problems += [f"{folder / name} was not fetched into this folder" for name in present if name not in known.files]
    remarks = [f"{place}: – ({why})" for place, why in known.missing.items() if place.partition("/")[0] in tasks]
    had |= {place.partition("/")[0] for place in known.missing}
    remarks += [f"{spec.name}: not fetched yet" for spec in specs if spec.name not in had]
    return problems, remarks


def _name(source: Source, split: str) -> str:
    return f"{source.place}/{split}.jsonl"


def _intact(folder: Path, name: str, known: RowsManifest) -> bool:
    entry = known.files.get(name)
    return entry is not None and (folder / name).is_file() and _sha256(folder / name) == entry.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _jsonl(rows: datasets.Dataset) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Max retries exceeded" in text:  # a page of nested exceptions
        why = re.search(
            r"Failed to resolve '[^']*'|\w* ?timed out|Connection refused|unreachable", text.replace("\\'", "'")
        )
        return f"no connection to the hub ({why.group() if why else text[:200]})"
    return text[:300] or type(error).__name__
