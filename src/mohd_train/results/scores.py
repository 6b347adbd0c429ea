"""Table 2 from stored results: our rows next to the paper's, the difference, and a mark on whatever can't be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from mohd_train.config.catalogue import SETTINGS
from mohd_train.errors import UserError
from mohd_train.results.paper import PaperRow
from mohd_train.results.store import Missing, Result, settings_mismatch
from mohd_train.results.suite import Suite, TaskSpec
from mohd_train.results.table import Number, Table

GROUP_NOTE = "Shots in brackets; accuracy in percent."
Reasons = tuple[tuple[str, str], ...]  # each (reason, detail)
# Prefixes of the reasons that make a score another kind of measurement than its neighbors', so that it can't be the best of them.
_PARTIAL = ("run with --limit", "demo questions", "not all", "more questions", "not trained to its end")


@dataclass(frozen=True)
class Score:
    """A score in percent (None: missing), its standard error, and the reasons why it can't be compared."""

    value: float | None = None
    reasons: Reasons = ()
    error: float | None = None

    @property
    def partial(self) -> bool:
        """Whether it is of a part of the questions, or of a model whose run has not ended."""
        return any(reason.startswith(_PARTIAL) for reason, _ in self.reasons)

    def number(self, signed: bool = False) -> Number | None:
        """As a table shows it."""
        return None if self.value is None else Number(self.value, 1, self.error, signed)


@dataclass(frozen=True)
class ScoreRow:
    """One row of Table 2.

    Attributes:
        kind: ours, paper or difference.
        model: the name that matches ours with the paper's.
        cells: in the order of the suite's tasks.
        reasons: why the whole row can't be compared.
        macro: task with subjects -> the mean that gives every subject the same weight.
        seeds: how many the means and standard errors are over; 0: one model.
    """

    label: str
    kind: str
    model: str
    activated: str
    total: str
    cells: tuple[Score, ...]
    average: Score
    reasons: Reasons = ()
    macro: Mapping[str, Score] = field(default_factory=dict)
    seeds: int = 0

    @property
    def scores(self) -> tuple[Score, ...]:
        """Those of the tasks, then the average."""
        return (*self.cells, self.average)


@dataclass
class Scores:
    """The rows of Table 2. ``remarks`` are lines below the whole table."""

    tasks: list[TaskSpec]
    rows: list[ScoreRow] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the best score of each task and of the average (the last column), as the paper stresses them: among
        our rows of one base model, or among the paper's own rows.

        A base model with one row has no best. Neither a score on a part of the questions nor one of an unfinished run is best.
        """
        kind = "ours" if any(row.kind == "ours" for row in self.rows) else "paper"
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.kind == kind:
                groups.setdefault(row.model.partition("-")[0].lower(), []).append(i)
        found = set()
        for rows in groups.values():
            for column in range(len(self.tasks) + 1):
                cells = {i: self.rows[i].scores[column] for i in rows}
                values = {i: cell.value for i, cell in cells.items() if cell.value is not None and not cell.partial}
                if len(values) > 1:
                    found |= {(i, column) for i, value in values.items() if value == max(values.values())}
        return found

    def notes(self) -> dict[str, tuple[str, str]]:
        """Reason -> (its letter, its text), in the order in which the reasons appear."""
        details: dict[str, list[str]] = {}
        for row in self.rows:
            for reason, detail in (*row.reasons, *(pair for score in row.scores for pair in score.reasons)):
                known = details.setdefault(reason, [])
                if detail and detail not in known:
                    known.append(detail)
        return {
            reason: (_letter(i), reason + (f": {', '.join(found)}" if found else ""))
            for i, (reason, found) in enumerate(details.items())
        }

    def below(self) -> list[str]:
        """Notes on our numbers: kinds of standard error, and the other mean of a task with subjects."""
        ours = [row for row in self.rows if row.kind == "ours"]
        lines = []
        if any(cell.error is not None for row in ours for cell in row.cells):
            seeds = [f"{row.label} ({row.seeds})" for row in ours if row.seeds]
            over = f"over seeds of {', '.join(seeds)}" if seeds else ""
            rest = "over questions (lm-eval's)" if len(seeds) < len(ours) else ""
            lines.append(f"± is the standard error {', else '.join(part for part in (over, rest) if part)}.")
        for spec in self.tasks:
            means = [f"{row.label} {row.macro[spec.name].number()}" for row in ours if spec.name in row.macro]
            if means:
                lines.append(
                    f"{spec.column} weighs every question the same; weighing every subject the same: {', '.join(means)}."
                )
        return lines

    def to_table(self) -> Table:
        """Table 2, ready to render."""
        columns = [f"{spec.column} ({spec.shots})" for spec in self.tasks]
        groups = [(name, len(list(specs))) for name, specs in groupby(self.tasks, key=lambda spec: spec.group)]
        table = Table(
            "Table 2: the ten tasks",
            ["Model", "# Activate", "# Params", *columns, "Average"],
            groups=[("", 3), *groups, ("", 1)],
            bold={(i, j + 3) for i, j in self.best()},
            blocks={0, *(i for i, row in enumerate(self.rows) if row.kind == "ours")},
            records=self._records(),
            captioned=False,
            bold_ours=True,
            minus="-",
        )
        notes = self.notes()
        for i, row in enumerate(self.rows):
            numbers = [score.number(signed=row.kind == "difference") for score in row.scores]
            table.add(row.label, row.activated, row.total, *numbers, faint=row.kind != "ours")
            for column, reasons in [(0, row.reasons), *((j + 3, score.reasons) for j, score in enumerate(row.scores))]:
                if reasons:
                    table.marks[i, column] = ",".join(dict.fromkeys(notes[reason][0] for reason, _ in reasons))
        table.notes = [GROUP_NOTE, *self.below(), *notes.values(), *self.remarks]
        return table

    def _records(self) -> list[list[str]]:
        """For CSV: identifiers, one number per column, and the reasons for the marks spelled out."""
        names = [spec.name for spec in self.tasks]
        with_subjects = [spec.name for spec in self.tasks if spec.subjects]
        header = ["model", "row", "label", "activated", "total", *names, "average"]
        header += [
            *(f"{name}_macro" for name in with_subjects),
            *(f"{name}_stderr" for name in (*names, "average")),
            "notes",
        ]
        lines = [header]
        for row in self.rows:
            reasons = [*row.reasons, *(pair for score in row.cells for pair in score.reasons)]
            texts = dict.fromkeys(reason + (f": {detail}" if detail else "") for reason, detail in reasons)
            if row.kind != "ours":  # the average of ours has the marks of its parts and no others
                texts |= dict.fromkeys(reason for reason, _ in row.average.reasons)
            numbers = [score.number(signed=row.kind == "difference") for score in row.scores]
            macros = [row.macro[name].number() if name in row.macro else None for name in with_subjects]
            values = [number.plain if number else "" for number in (*numbers, *macros)]
            values += [number.plain_error if number else "" for number in numbers]
            lines.append([row.model, row.kind, row.label, row.activated, row.total, *values, "; ".join(texts)])
        return lines


def _letter(index: int) -> str:
    return ("" if index < 26 else chr(96 + index // 26)) + chr(97 + index % 26)


def build_scores(
    suite: Suite,
    paper: Mapping[str, PaperRow],
    results: Sequence[Result],
    paper_only: bool = False,
    missing: Sequence[Missing] = (),
) -> Scores:
    """The rows of Table 2.

    Args:
        results: of any number of models; each model's tasks make one row.
        paper_only: the paper's own table; ``results`` are ignored.
        missing: why models that have a row lack a task.

    Raises:
        UserError: two results for the same task of the same checkpoint.
    """
    scores = Scores(list(suite.tasks.values()))
    if paper_only:
        scores.rows = [_paper_row(suite, row) for row in paper.values()]
        return scores
    models = _by_model(results)
    why = {(one.model["name"], one.model["fingerprint"], one.task): one.reason for one in missing}
    names = [tasks[next(iter(tasks))].model["name"] for tasks in models.values()]
    keyed = sorted(
        zip(names, models.values(), strict=True),
        key=lambda item: _place(item[0], list(paper)),
    )
    for name, tasks in keyed:
        ours = _our_row(suite, name, tasks, why, twin=names.count(name) > 1)
        scores.rows.append(ours)
        if (row := paper.get(name.lower())) is not None:
            scores.rows[-1] = ours = replace(ours, reasons=(*ours.reasons, *_other_size(ours, tasks, row)))
            theirs = _paper_row(suite, row)
            scores.rows += [theirs, _difference(ours, theirs)]
    return scores


def _place(name: str, order: list[str]) -> tuple[int, str, int, str]:
    """Sort key of a model: in the paper's order; others after it, by base model with the settings in the paper's order."""
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
) -> ScoreRow:
    model = next(iter(tasks.values())).model
    label = f"{name} [{model['fingerprint'][:6]}]" if twin else name
    lacking = {task: why.get((name, model["fingerprint"], task)) for task in suite.tasks}
    cells = tuple(_cell(suite, spec, tasks.get(task), lacking[task]) for task, spec in suite.tasks.items())
    shown = [tasks[task].by_seed for task, cell in zip(suite.tasks, cells, strict=True) if cell.value is not None]
    macro = {
        task: Score(100 * value, error=_hundredfold(tasks[task].scores.get(f"{spec.metric}_macro_stderr")))
        for (task, spec), cell in zip(suite.tasks.items(), cells, strict=True)
        if cell.value is not None and (value := tasks[task].scores.get(f"{spec.metric}_macro")) is not None
    }
    return ScoreRow(
        label,
        kind="ours",
        model=name,
        activated=short_count(model["activated"]),
        total=short_count(model["total"]),
        cells=cells,
        average=_average(cells, shown),
        reasons=_mixed(name, tasks),
        macro=macro,
        seeds=max(map(len, shown), default=0),
    )


def _hundredfold(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _mixed(name: str, tasks: Mapping[str, Result]) -> Reasons:
    """A row whose results don't all have the same precision."""
    by: dict[str, list[str]] = {}
    for task, result in tasks.items():
        by.setdefault(result.settings.dtype, []).append(task)
    if len(by) == 1:
        return ()
    detail = "; ".join(f"{dtype} for {', '.join(those)}" for dtype, those in by.items())
    return (("results of more than one precision", f"{name}: {detail}"),)


def _other_size(ours: ScoreRow, tasks: Mapping[str, Result], theirs: PaperRow) -> Reasons:
    """A model with one of the paper's names but another size (--name, or a smaller scale)."""
    model = next(iter(tasks.values())).model
    if theirs.has_counts(model["activated"], model["total"]):
        return ()
    detail = f"{ours.label} {ours.activated} / {ours.total}, {theirs.model} {theirs.activated} / {theirs.params}"
    return (("not the paper's model: other parameter counts (activated / total)", detail),)


def _cell(suite: Suite, spec: TaskSpec, result: Result | None, why: str | None) -> Score:
    """A score with other settings than the column's is named below the table, not shown in it."""
    if result is None:
        return Score(reasons=((f"{spec.name} was unavailable", why),) if why else ())
    value = result.scores.get(spec.metric)
    shown = "" if value is None else f", {result.model['name']}: {100 * value:.1f}"
    if mismatch := settings_mismatch(suite, result.settings):
        return Score(reasons=tuple((f"{reason}: left out", detail + shown) for reason, detail in mismatch))
    if value is not None and not math.isfinite(value):
        return Score(reasons=((f"{spec.name}: the score is not a number ({value})", result.model["name"]),))
    error = _hundredfold(result.scores.get(f"{spec.metric}_stderr"))
    return Score(_hundredfold(value), tuple(reasons_of(suite, spec, result)), error if value is not None else None)


def reasons_of(suite: Suite, spec: TaskSpec, result: Result) -> list[tuple[str, str]]:
    """Why a score can't be compared with the paper's, although its settings are the same."""
    used, found = result.settings, []
    if result.model.get("unfinished"):
        found.append(("not trained to its end", f"{result.model['name']} {result.model['unfinished']}"))
    if result.scores.get(spec.metric) is None:
        found.append((f"the result has no {spec.metric}", spec.name))
    if used.demo:
        found.append(("demo questions, not the task's own: the number is not meaningful", ""))
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


def _average(cells: Sequence[Score], seeds: Sequence[Mapping[str, float]]) -> Score:
    """Over all tasks; missing if one of them is. It carries the marks of its parts.

    Its standard error is that over the averages of the seeds, or that of a mean of independent scores.

    Args:
        seeds: for each task, run -> score; empty if there is one model.
    """
    values = [cell.value for cell in cells if cell.value is not None]
    if not values or len(values) < len(cells):
        return Score()
    errors = [cell.error for cell in cells if cell.error is not None]
    error = None
    if all(one and one.keys() == seeds[0].keys() for one in seeds):
        averages = [100 * statistics.fmean(one[run] for one in seeds) for run in seeds[0]]
        error = statistics.stdev(averages) / math.sqrt(len(averages))
    elif not any(seeds) and len(errors) == len(values):
        error = math.hypot(*errors) / len(errors)
    marks = tuple(dict.fromkeys((reason, "") for cell in cells for reason, _ in cell.reasons))
    return Score(sum(values) / len(values), marks, error)


def _paper_row(suite: Suite, row: PaperRow) -> ScoreRow:
    cells = tuple(Score(row.scores.get(spec.paper_key)) for spec in suite.tasks.values())
    noted = ((row.note, row.label),) if row.note else ()
    return ScoreRow(
        f"{row.label}, paper", "paper", row.name, row.activated, row.params, cells, Score(row.average, noted)
    )


def _difference(ours: ScoreRow, theirs: ScoreRow) -> ScoreRow:
    """Ours minus the paper's, in percentage points, with the marks of both."""

    def less(a: Score, b: Score) -> Score:
        marks = tuple(dict.fromkeys((reason, "") for reason, _ in (*a.reasons, *b.reasons)))
        return Score(a.value - b.value if a.value is not None and b.value is not None else None, marks)

    cells = tuple(less(a, b) for a, b in zip(ours.cells, theirs.cells, strict=True))
    whole = tuple((reason, "") for reason, _ in ours.reasons)
    return ScoreRow("difference", "difference", ours.model, "", "", cells, less(ours.average, theirs.average), whole)


def short_count(parameters: int) -> str:
    """As the paper prints counts: ``289M``, ``1.06B``; ``4.2M`` and ``123K`` for small models."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            digits = 2 if unit == "B" else 1 if unit == "M" and parameters < 10**7 else 0
            return f"{parameters / size:.{digits}f}{unit}"
    return str(parameters)
