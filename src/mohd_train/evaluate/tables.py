"""Table 2 from stored results: ours, the paper's row beside each, the difference, and a mark on whatever cannot be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mohd_train.config.catalogue import SETTINGS
from mohd_train.errors import UserError
from mohd_train.evaluate.paper import PaperRow
from mohd_train.evaluate.results import Missing, Result, asked_otherwise
from mohd_train.evaluate.suite import Suite, TaskSpec

Reasons = tuple[tuple[str, str], ...]  # each (reason, detail)
# how the reasons begin for which a score is of another measurement than its neighbours, and so no best of them
_PARTIAL = ("run with --limit", "demo questions", "not all", "more questions", "not trained to its end")


@dataclass(frozen=True)
class Cell:
    """A score in percent (None: missing), the reasons that set it apart, and its standard error where it has one."""

    value: float | None = None
    reasons: Reasons = ()
    error: float | None = None

    @property
    def partial(self) -> bool:
        """Whether it is of a part of the questions, or of a model that is not at its end."""
        return any(reason.startswith(_PARTIAL) for reason, _ in self.reasons)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``cells`` follow the suite's tasks."""

    label: str
    kind: str  # ours | paper | difference
    model: str  # the name by which ours and the paper's are matched
    activated: str
    total: str
    cells: tuple[Cell, ...]
    average: Cell
    reasons: Reasons = ()  # that set the whole row apart
    macro: Mapping[str, Cell] = field(
        default_factory=dict
    )  # of a task with subjects: the mean that weighs each the same
    seeds: int = 0  # behind means and standard errors; 0: one model

    @property
    def marked(self) -> list[Reasons]:
        """The reasons of the row, of each cell and of the average, in the order in which they are shown."""
        return [self.reasons, *(cell.reasons for cell in (*self.cells, self.average))]


@dataclass
class Table:
    """The whole table, ready for a format."""

    tasks: list[TaskSpec]
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # of the whole table, below it

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the best score of each task, and of the average, among ours of one base; or among the paper's own.

        As the paper stresses them. The last column is the average; a base with one row has no best. A score of a part of the
        questions, or of a run that is not at its end, is none.
        """
        kind = "ours" if any(row.kind == "ours" for row in self.rows) else "paper"
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.kind == kind:
                groups.setdefault(row.model.partition("-")[0].lower(), []).append(i)
        found = set()
        for rows in groups.values():
            for column in range(len(self.tasks) + 1):
                cells = {i: (*self.rows[i].cells, self.rows[i].average)[column] for i in rows}
                values = {i: cell.value for i, cell in cells.items() if cell.value is not None and not cell.partial}
                if len(values) > 1:
                    found |= {(i, column) for i, value in values.items() if value == max(values.values())}
        return found

    def notes(self) -> dict[str, tuple[str, str]]:
        """Reason -> (its letter, its text), in the order in which the reasons appear."""
        details: dict[str, list[str]] = {}
        for row in self.rows:
            for reason, detail in (pair for reasons in row.marked for pair in reasons):
                known = details.setdefault(reason, [])
                if detail and detail not in known:
                    known.append(detail)
        return {
            reason: (_letter(i), reason + (f": {', '.join(found)}" if found else ""))
            for i, (reason, found) in enumerate(details.items())
        }

    def below(self) -> list[str]:
        """What the numbers of ours are: standard errors, and the other mean of a task with subjects."""
        ours = [row for row in self.rows if row.kind == "ours"]
        lines = []
        if any(cell.error is not None for row in ours for cell in row.cells):
            seeds = [f"{row.label} ({row.seeds})" for row in ours if row.seeds]
            over = f"over seeds of {', '.join(seeds)}" if seeds else ""
            rest = "over questions (lm-eval's)" if len(seeds) < len(ours) else ""
            lines.append(f"± is the standard error {', else '.join(part for part in (over, rest) if part)}.")
        for spec in self.tasks:
            means = [f"{row.label} {percent(row.macro[spec.name])}" for row in ours if spec.name in row.macro]
            if means:
                lines.append(
                    f"{spec.column} weighs every question the same; weighing every subject the same: {', '.join(means)}."
                )
        return lines


def _letter(index: int) -> str:
    return ("" if index < 26 else chr(96 + index // 26)) + chr(97 + index % 26)


def percent(cell: Cell) -> str:
    """``31.1``, ``31.1 ± 0.5``."""
    assert cell.value is not None
    return f"{cell.value:.1f}" + ("" if cell.error is None else f" ± {cell.error:.1f}")


def build_table(
    suite: Suite,
    paper: Mapping[str, PaperRow],
    results: Sequence[Result],
    paper_only: bool = False,
    missing: Sequence[Missing] = (),
) -> Table:
    """Table 2.

    Args:
        results: of any number of models; each model's tasks make one row.
        missing: why models that have a row lack a task.
        paper_only: the paper's own table; ``results`` are not looked at.

    Raises:
        UserError: two results for the same task of the same checkpoint.
    """
    table = Table(list(suite.tasks.values()))
    if paper_only:
        table.rows = [_paper_row(suite, row) for row in paper.values()]
        return table
    models = _by_model(results)
    why = {(one.model["name"], one.model["fingerprint"], one.task): one.reason for one in missing}
    names = [tasks[next(iter(tasks))].model["name"] for tasks in models.values()]
    keyed = sorted(
        zip(names, models.values(), strict=True),
        key=lambda item: _place(item[0], list(paper)),
    )
    for name, tasks in keyed:
        ours = _our_row(suite, name, tasks, why, twin=names.count(name) > 1)
        table.rows.append(ours)
        if (row := paper.get(name.lower())) is not None:
            table.rows[-1] = ours = replace(ours, reasons=(*ours.reasons, *_other_size(ours, tasks, row)))
            theirs = _paper_row(suite, row)
            table.rows += [theirs, _difference(ours, theirs)]
    return table


def _place(name: str, order: list[str]) -> tuple[int, str, int, str]:
    """Where a model stands: as in the paper, then by base model with the settings in the paper's order."""
    if name.lower() in order:
        return order.index(name.lower()), "", 0, name
    base, _, setting = name.rpartition("-")
    return len(order), base, SETTINGS.index(setting) if setting in SETTINGS else len(SETTINGS), name


def _by_model(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, Result]]:
    """(name, fingerprint) -> task -> result."""
    models: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        tasks = models.setdefault((result.model["name"], result.model["fingerprint"]), {})
        other = tasks.setdefault(result.settings.task, result)
        if other is not result:
            raise UserError(
                f"two results for {result.settings.task} of {result.model['name']}: {other.path} and {result.path}; give only one"
            )
    return models


def _our_row(
    suite: Suite, name: str, tasks: Mapping[str, Result], why: Mapping[tuple[str, str, str], str], twin: bool
) -> Row:
    model = next(iter(tasks.values())).model
    label = f"{name} [{model['fingerprint'][:6]}]" if twin else name
    lacking = {task: why.get((name, model["fingerprint"], task)) for task in suite.tasks}
    cells = tuple(_cell(suite, spec, tasks.get(task), lacking[task]) for task, spec in suite.tasks.items())
    shown = [tasks[task].by_seed for task, cell in zip(suite.tasks, cells, strict=True) if cell.value is not None]
    return Row(
        label,
        "ours",
        name,
        count(model["activated"]),
        count(model["total"]),
        cells,
        _average(cells, shown),
        _mixed(name, tasks),
        {
            task: Cell(100 * value, error=_hundredfold(tasks[task].scores.get(f"{spec.metric}_macro_stderr")))
            for (task, spec), cell in zip(suite.tasks.items(), cells, strict=True)
            if cell.value is not None and (value := tasks[task].scores.get(f"{spec.metric}_macro")) is not None
        },
        max(map(len, shown), default=0),
    )


def _hundredfold(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _mixed(name: str, tasks: Mapping[str, Result]) -> Reasons:
    """A row of results that were not all made with the same precision."""
    by: dict[str, list[str]] = {}
    for task, result in tasks.items():
        by.setdefault(result.settings.dtype, []).append(task)
    if len(by) == 1:
        return ()
    detail = "; ".join(f"{dtype} for {', '.join(those)}" for dtype, those in by.items())
    return (("results of more than one precision", f"{name}: {detail}"),)


def _other_size(ours: Row, tasks: Mapping[str, Result], theirs: PaperRow) -> Reasons:
    """A name of the paper's on a model of another size (--name, or a smaller scale)."""
    model = next(iter(tasks.values())).model
    if theirs.has_counts(model["activated"], model["total"]):
        return ()
    detail = f"{ours.label} {ours.activated} / {ours.total}, {theirs.model} {theirs.activated} / {theirs.params}"
    return (("not the paper's model: other parameter counts (activated / total)", detail),)


def _cell(suite: Suite, spec: TaskSpec, result: Result | None, why: str | None) -> Cell:
    """A score asked in another way than the column's is named below the table, not shown in it."""
    if result is None:
        return Cell(reasons=((f"{spec.name} could not be had", why),) if why else ())
    value = result.scores.get(spec.metric)
    shown = "" if value is None else f", {result.model['name']}: {100 * value:.1f}"
    if otherwise := asked_otherwise(suite, result.settings):
        return Cell(reasons=tuple((f"{reason}: left out", detail + shown) for reason, detail in otherwise))
    if value is not None and not math.isfinite(value):
        return Cell(reasons=((f"{spec.name}: the score is not a number ({value})", result.model["name"]),))
    error = _hundredfold(result.scores.get(f"{spec.metric}_stderr"))
    return Cell(_hundredfold(value), tuple(reasons_of(suite, spec, result)), error if value is not None else None)


def reasons_of(suite: Suite, spec: TaskSpec, result: Result) -> list[tuple[str, str]]:
    """What sets this score apart from the one that the paper's table shows, though it is asked in the same way."""
    used, found = result.settings, []
    if result.model.get("unfinished"):
        found.append(("not trained to its end", f"{result.model['name']} {result.model['unfinished']}"))
    if result.scores.get(spec.metric) is None:
        found.append((f"the result has no {spec.metric}", spec.name))
    if used.demo:
        found.append(("demo questions, not the task's own: the number means nothing", ""))
    elif used.limit is not None:
        found.append(("run with --limit", f"{spec.name} {result.questions} of {spec.questions} questions"))
    elif result.questions < spec.questions:
        found.append(("not all of the task's questions", f"{spec.name} {result.questions} of {spec.questions}"))
    elif result.questions > spec.questions:
        found.append(("more questions than the task has", f"{spec.name} {result.questions}, not {spec.questions}"))
    if used.bos != "auto":
        found.append((f"asked with --bos {used.bos}", f"{result.model['name']} {spec.name}"))
    if used.seed != suite.seed and used.shots:
        found.append(("other shots drawn", f"seed {used.seed}, not {suite.seed}"))
    if spec.subjects and result.subjects < spec.subjects and not used.demo:
        found.append(("not all subjects", f"{spec.name} {result.subjects} of {spec.subjects}"))
    if result.truncated["requests"]:
        detail = f"{result.model['name']} {spec.name} {result.truncated['requests']} of {result.truncated['of']}"
        cut = "their first shots cut" if used.shots else "the beginning of the question cut"
        found.append((f"requests longer than the model's context, {cut}", detail))
    if result.joined.get("requests"):
        detail = f"{result.model['name']} {spec.name} {result.joined['requests']} of {result.truncated['of']}"
        detail += f" ({result.joined['alone']} encoded alone)" if result.joined["alone"] else ""
        found.append(("answers that share a token with their question", detail))
    return found


def _average(cells: Sequence[Cell], seeds: Sequence[Mapping[str, float]]) -> Cell:
    """Over all tasks; missing where one of them is. It bears the marks of its parts.

    Its standard error is that over the averages of the seeds, or of a mean of independent scores.

    Args:
        seeds: of each task run -> score, empty where there is one model.
    """
    values = [cell.value for cell in cells if cell.value is not None]
    if not values or len(values) < len(cells):
        return Cell()
    errors = [cell.error for cell in cells if cell.error is not None]
    error = None
    if all(one and one.keys() == seeds[0].keys() for one in seeds):
        averages = [100 * statistics.fmean(one[run] for one in seeds) for run in seeds[0]]
        error = statistics.stdev(averages) / math.sqrt(len(averages))
    elif not any(seeds) and len(errors) == len(values):
        error = math.hypot(*errors) / len(errors)
    marks = tuple(dict.fromkeys((reason, "") for cell in cells for reason, _ in cell.reasons))
    return Cell(sum(values) / len(values), marks, error)


def _paper_row(suite: Suite, row: PaperRow) -> Row:
    cells = tuple(Cell(row.scores.get(spec.paper_key)) for spec in suite.tasks.values())
    noted = ((row.note, row.label),) if row.note else ()
    return Row(f"{row.label}, paper", "paper", row.name, row.activated, row.params, cells, Cell(row.average, noted))


def _difference(ours: Row, theirs: Row) -> Row:
    """Ours less the paper's, in percentage points, with the marks of both."""

    def less(a: Cell, b: Cell) -> Cell:
        marks = tuple(dict.fromkeys((reason, "") for reason, _ in (*a.reasons, *b.reasons)))
        return Cell(a.value - b.value if a.value is not None and b.value is not None else None, marks)

    cells = tuple(less(a, b) for a, b in zip(ours.cells, theirs.cells, strict=True))
    whole = tuple((reason, "") for reason, _ in ours.reasons)
    return Row("difference", "difference", ours.model, "", "", cells, less(ours.average, theirs.average), whole)


def count(parameters: int) -> str:
    """As the paper prints counts: ``289M``, ``1.06B``; ``4.2M`` and ``123K`` for small models."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            digits = 2 if unit == "B" else 1 if unit == "M" and parameters < 10**7 else 0
            return f"{parameters / size:.{digits}f}{unit}"
    return str(parameters)
