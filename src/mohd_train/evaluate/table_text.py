"""Any of the paper's tables, from a sweep or from results, as text."""

from __future__ import annotations

from collections.abc import Sequence
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


def table2(sources: Sequence[Path | str]) -> tables.Table:
    """Table 2 of a sweep, of results, or the paper's own."""
    if len(sources) == 1 and not is_remote(sources[0]) and (Path(sources[0]) / RECORD).is_file():
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
    table.remarks = [*scale, *_seed_errors(merged), *found.notes]
    return table


def _seed_errors(merged: list[results.Result]) -> list[str]:
    """What several seeds say of the noise, model by model."""
    by_model: dict[str, list[str]] = {}
    for one in merged:
        error = one.scores.get(f"{one.settings.metric}_seeds_stderr")
        if error is not None:
            by_model.setdefault(one.model["name"], []).append(f"{one.settings.task} {100 * error:.1f}")
    return [f"{name}: standard error over seeds: {', '.join(errors)}" for name, errors in by_model.items()]
