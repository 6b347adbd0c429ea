"""Any of the paper's tables, from a sweep or from results, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.evaluate import formats, grid, paper, results, tables
from mohd_train.evaluate.output import local
from mohd_train.evaluate.paper_tables import TABLES, load_numbers
from mohd_train.evaluate.suite import load_suite
from mohd_train.evaluate.sweep_results import SweepResults, merged_tasks, missing_tasks, read_sweep_results
from mohd_train.storage import is_remote, refuse_remote
from mohd_train.sweep.folder import RECORD


def table_text(number: int, sources: Sequence[Path | str], form: str) -> str:
    """The text of Table ``number``; the paper's own where there are no sources.

    Args:
        sources: the folder of a launched sweep; for Table 2 also result files and folders, on object storage too.
        form: md, csv, latex or html.

    Raises:
        UserError: sources that are not what the table needs.
    """
    if number == 2:
        return formats.FORMATS[form](table2(sources))
    if len(sources) > 1:
        raise UserError(f"Table {number} is of one sweep; give one folder, not {len(sources)}")
    for source in sources:
        refuse_remote(source, "the sweep", "copy it here first (aws s3 sync s3://... FOLDER)")
    found = read_sweep_results(Path(sources[0])) if sources else None
    return grid.FORMATS[form](TABLES[number](load_numbers(), found))


def subjects_text(sources: Sequence[Path | str], form: str) -> str:
    """MMLU's subjects, a row each, with a column for each model; then both means.

    Args:
        sources: the folder of a launched sweep, or result files and folders.
        form: md, csv, latex or html.

    Raises:
        UserError: no results of a task with subjects.
    """
    found, suite = _results(sources), load_suite()
    ours = [one for one in found if suite.tasks[one.settings.task].subjects]
    if not ours:
        raise UserError("no results of a task with subjects (mmlu) there; eval/run_eval.py --tasks mmlu makes them")
    names = [one.model["name"] for one in ours]
    labels = [
        name if names.count(name) == 1 else f"{name} [{one.model['fingerprint'][:6]}]"
        for name, one in zip(names, ours, strict=True)
    ]
    table = grid.Grid("MMLU by subject, accuracy in percent", ["Subject", "Questions", *labels])
    for subject in sorted({subject for one in ours for subject in one.subject_scores}):
        each = [one.subject_scores.get(subject, {}) for one in ours]
        counts = {f"{count:.0f}" for scores in each if (count := scores.get("questions")) is not None}
        table.add(subject, " / ".join(sorted(counts)), *(_percent(scores, "acc") for scores in each))
    table.add("mean over questions", None, *(_percent(one.scores, "acc") for one in ours))
    table.add("mean over subjects", None, *(_percent(one.scores, "acc_macro") for one in ours))
    return grid.FORMATS[form](table)


def _percent(scores: Mapping[str, float | None], metric: str) -> grid.Number | None:
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    return None if value is None else grid.Number(100 * value, 1, None if error is None else 100 * error)


def _is_sweep(sources: Sequence[Path | str]) -> bool:
    return len(sources) == 1 and not is_remote(sources[0]) and (Path(sources[0]) / RECORD).is_file()


def _results(sources: Sequence[Path | str]) -> list[results.Result]:
    if _is_sweep(sources):
        return merged_tasks(read_sweep_results(Path(sources[0])))
    return results.find([local(source) for source in sources]).results


def table2(sources: Sequence[Path | str]) -> tables.Table:
    """Table 2 of a sweep, of results, or the paper's own."""
    if _is_sweep(sources):
        return table2_of(read_sweep_results(Path(sources[0])))
    found = results.find([local(source) for source in sources])
    table = tables.build_table(
        load_suite(), paper.load_paper(), found.results, paper_only=not sources, missing=found.missing
    )
    table.remarks = found.notes
    return table


def table2_of(found: SweepResults) -> tables.Table:
    """Table 2 of a sweep. Raises UserError where none of its runs has been evaluated."""
    merged = merged_tasks(found)
    if not merged:
        raise UserError(
            f"{found.folder} has no results of the ten tasks yet; python eval/run_eval.py --sweep {found.folder}"
        )
    table = tables.build_table(load_suite(), paper.load_paper(), merged, missing=missing_tasks(found))
    scale = (
        []
        if found.scale == "paper"
        else [f"ours at the {found.scale} scale: not the paper's models, their proportions"]
    )
    table.remarks = [*scale, *found.notes]
    return table
