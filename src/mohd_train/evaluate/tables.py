"""Table 2 from stored results: ours, the paper's row beside each, the difference, and a mark on whatever cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mohd_train.config.catalogue import SETTINGS
from mohd_train.errors import UserError
from mohd_train.evaluate.paper import PaperRow
from mohd_train.evaluate.results import Missing, Result, asked_otherwise
from mohd_train.evaluate.suite import Suite, TaskSpec


@dataclass(frozen=True)
class Cell:
    """A score in percent (None: missing) and the reasons that set it apart, each as (reason, detail)."""

    value: float | None = None
    reasons: tuple[tuple[str, str], ...] = ()


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


@dataclass
class Table:
    """The whole table, ready for a format."""

    tasks: list[TaskSpec]
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # of the whole table, below it

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the best score of each task, and of the average, among ours of one base; or among the paper's own.

        As the paper stresses them. The last column is the average; a base with one row has no best.
        """
        kind = "ours" if any(row.kind == "ours" for row in self.rows) else "paper"
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.kind == kind:
                groups.setdefault(row.model.partition("-")[0].lower(), []).append(i)
        found = set()
        for rows in groups.values():
            for column in range(len(self.tasks) + 1):
                values = {
                    i: v for i in rows if (v := (*self.rows[i].cells, self.rows[i].average)[column].value) is not None
                }
                if len(values) > 1:
                    found |= {(i, column) for i, value in values.items() if value == max(values.values())}
        return found

    def notes(self) -> dict[str, tuple[str, str]]:
        """Reason -> (its letter, its text), in the order in which the reasons appear."""
        details: dict[str, list[str]] = {}
        for row in self.rows:
            for reason, detail in (pair for cell in (*row.cells, row.average) for pair in cell.reasons):
                known = details.setdefault(reason, [])
                if detail and detail not in known:
                    known.append(detail)
        return {
            reason: (_letter(i), reason + (f": {', '.join(found)}" if found else ""))
            for i, (reason, found) in enumerate(details.items())
        }


def _letter(index: int) -> str:
    return ("" if index < 26 else chr(96 + index // 26)) + chr(97 + index % 26)


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
    return Row(label, "ours", name, count(model["activated"]), count(model["total"]), cells, _average(cells))


def _cell(suite: Suite, spec: TaskSpec, result: Result | None, why: str | None) -> Cell:
    """A score asked in another way than the column's is named below the table, not shown in it."""
    if result is None:
        return Cell(reasons=((f"{spec.name} could not be had", why),) if why else ())
    value = result.scores.get(spec.metric)
    shown = "" if value is None else f", {result.model['name']}: {100 * value:.1f}"
    if otherwise := asked_otherwise(suite, result.settings):
        return Cell(reasons=tuple((f"{reason}: left out", detail + shown) for reason, detail in otherwise))
    return Cell(None if value is None else 100 * value, tuple(_reasons(suite, spec, result)))


def _reasons(suite: Suite, spec: TaskSpec, result: Result) -> list[tuple[str, str]]:
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
    if used.seed != suite.seed and used.shots:
        found.append(("other shots drawn", f"seed {used.seed}, not {suite.seed}"))
    if spec.subjects and result.subjects < spec.subjects and not used.demo:
        found.append(("not all subjects", f"{spec.name} {result.subjects} of {spec.subjects}"))
    if result.truncated["requests"]:
        detail = f"{result.model['name']} {spec.name} {result.truncated['requests']} of {result.truncated['of']}"
        found.append(("requests longer than the model's context, their first shots cut", detail))
    return found


def _average(cells: Sequence[Cell]) -> Cell:
    """Over all tasks; missing where one of them is. It bears the marks of its parts."""
    values = [cell.value for cell in cells if cell.value is not None]
    if not values or len(values) < len(cells):
        return Cell()
    return Cell(
        sum(values) / len(values), tuple(dict.fromkeys((reason, "") for cell in cells for reason, _ in cell.reasons))
    )


def _paper_row(suite: Suite, row: PaperRow) -> Row:
    cells = tuple(Cell(row.scores.get(spec.paper_key)) for spec in suite.tasks.values())
    noted = ((row.note, row.label),) if row.note else ()
    return Row(f"{row.label}, paper", "paper", row.name, row.activated, row.params, cells, Cell(row.average, noted))


def _difference(ours: Row, theirs: Row) -> Row:
    """Ours less the paper's, in percentage points."""

    def less(a: Cell, b: Cell) -> Cell:
        return Cell(a.value - b.value if a.value is not None and b.value is not None else None)

    cells = tuple(less(a, b) for a, b in zip(ours.cells, theirs.cells, strict=True))
    return Row("difference", "difference", ours.model, "", "", cells, less(ours.average, theirs.average))


def count(parameters: int) -> str:
    """As the paper prints counts: ``289M``, ``1.06B``; ``4.2M`` and ``123K`` for small models."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            digits = 2 if unit == "B" else 1 if unit == "M" and parameters < 10**7 else 0
            return f"{parameters / size:.{digits}f}{unit}"
    return str(parameters)
