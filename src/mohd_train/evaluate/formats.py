"""Table 2 as Markdown, CSV, LaTeX or HTML. What is missing is a dash (in CSV: empty), never 0."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from itertools import groupby

from mohd_train.evaluate.grid import Grid
from mohd_train.evaluate.grid import to_html as grid_to_html
from mohd_train.evaluate.tables import Cell, Reasons, Row, Table, percent

MISSING = "–"
GROUP_NOTE = "Shots in brackets; accuracy in percent."


def _value(cell: Cell, kind: str) -> str:
    if cell.value is None:
        return MISSING
    return f"{cell.value:+.1f}" if kind == "difference" else percent(cell)


def _marks(table: Table, reasons: Reasons) -> str:
    """``a,c``."""
    notes = table.notes()
    return ",".join(dict.fromkeys(notes[reason][0] for reason, _ in reasons))


def _groups(table: Table) -> list[tuple[str, int]]:
    """(group, number of columns) in a row of the table."""
    return [(name, len(list(specs))) for name, specs in groupby(table.tasks, key=lambda spec: spec.group)]


def _cells(row: Row) -> list[Cell]:
    return [*row.cells, row.average]


def to_markdown(table: Table) -> str:
    """A Markdown table with a line of groups and numbered notes below."""
    best = table.best()

    def marked(text: str, reasons: Reasons) -> str:
        return text + (f" <sup>{_marks(table, reasons)}</sup>" if reasons else "")

    def shown(place: tuple[int, int], cell: Cell, kind: str) -> str:
        value = f"**{_value(cell, kind)}**" if place in best else _value(cell, kind)
        return marked(value, cell.reasons)

    heads = ["Model", "# Activate", "# Params", *[f"{spec.column} ({spec.shots})" for spec in table.tasks], "Average"]
    groups = ["", "", "", *[f"*{name}*" if i == 0 else "" for name, size in _groups(table) for i in range(size)], ""]
    body = [
        [marked(f"**{row.label}**" if row.kind == "ours" else row.label, row.reasons), row.activated, row.total]
        + [shown((i, j), cell, row.kind) for j, cell in enumerate(_cells(row))]
        for i, row in enumerate(table.rows)
    ]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, rule, groups, *body)]
    below = [*[f"<sup>{letter}</sup> {text}" for letter, text in table.notes().values()], *table.remarks]
    return "\n".join([*lines, "", "  \n".join([GROUP_NOTE, *table.below(), *below]), ""])


def to_csv(table: Table) -> str:
    """One line a row; a missing value is empty. Standard errors, means over subjects and the reasons for marks have columns of
    their own."""
    names, grouped = [spec.name for spec in table.tasks], [spec.name for spec in table.tasks if spec.subjects]
    extra = [*(f"{name}_macro" for name in grouped), *(f"{name}_stderr" for name in (*names, "average"))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "row", "label", "activated", "total", *names, "average", *extra, "notes"])

    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.1f}"

    for row in table.rows:
        reasons = dict.fromkeys(
            reason + (f": {detail}" if detail else "")
            for pairs in (row.reasons, *(cell.reasons for cell in row.cells))
            for reason, detail in pairs
        )
        if row.kind != "ours":  # the average of ours has the marks of its parts and no others
            reasons.update(dict.fromkeys(reason for reason, _ in row.average.reasons))
        values = [number(cell.value, "+" if row.kind == "difference" else "") for cell in _cells(row)]
        values += [number(row.macro.get(name, Cell()).value) for name in grouped]
        values += [number(cell.error) for cell in _cells(row)]
        writer.writerow([row.model, row.kind, row.label, row.activated, row.total, *values, "; ".join(reasons)])
    return out.getvalue()


def _tex(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("#", r"\#"), ("_", r"\_")):
        text = text.replace(plain, escaped)
    return text.replace(MISSING, "--").replace("±", r"$\pm$")


def to_latex(table: Table) -> str:
    """A `tabular` in booktabs style with a row of groups; notes as text after it."""
    best = table.best()

    def marked(text: str, reasons: Reasons) -> str:
        return text + (f"$^{{{_marks(table, reasons)}}}$" if reasons else "")

    def shown(place: tuple[int, int], cell: Cell, kind: str) -> str:
        value = _value(cell, kind)
        value = f"${value}$" if kind == "difference" and value != MISSING else _tex(value)  # $-1.2$: a minus, no hyphen
        value = rf"\textbf{{{value}}}" if place in best else value
        return marked(value, cell.reasons)

    columns = "lrr" + "r" * len(table.tasks) + "r"
    groups = " & ".join(rf"\multicolumn{{{size}}}{{c}}{{{_tex(name)}}}" for name, size in _groups(table))
    heads = ["Model", "# Activate", "# Params", *[f"{spec.column} ({spec.shots})" for spec in table.tasks], "Average"]
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rf"& & & {groups} & \\",
        " & ".join(map(_tex, heads)) + r" \\",
    ]
    for i, row in enumerate(table.rows):
        if row.kind == "ours" or row is table.rows[0]:
            lines.append(r"\midrule")
        first = [marked(_tex(row.label), row.reasons), row.activated, row.total]
        lines.append(" & ".join(first + [shown((i, j), cell, row.kind) for j, cell in enumerate(_cells(row))]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    below = [
        *map(_tex, (GROUP_NOTE, *table.below())),
        *[rf"$^{{{letter}}}$ {_tex(text)}" for letter, text in table.notes().values()],
        *map(_tex, table.remarks),
    ]
    return "\n".join([*lines, "", *[f"{line}\\\\" for line in below[:-1]], below[-1], ""])


def to_grid(table: Table) -> Grid:
    """The table as rows of text, for a page."""
    heads = ["Model", "# Activate", "# Params", *[f"{spec.column} ({spec.shots})" for spec in table.tasks], "Average"]
    grid = Grid("Table 2: the ten tasks", heads)

    def marked(text: str, reasons: Reasons) -> str:
        return text + (f" ({_marks(table, reasons)})" if reasons else "")

    for row in table.rows:
        values = [marked(_value(cell, row.kind), cell.reasons) for cell in _cells(row)]
        grid.add(marked(row.label, row.reasons), row.activated, row.total, *values, faint=row.kind != "ours")
    grid.bold = {(i, j + 3) for i, j in table.best()}
    notes = [f"({letter}) {text}" for letter, text in table.notes().values()]
    grid.notes = [GROUP_NOTE, *table.below(), *notes, *table.remarks]
    return grid


def to_html(table: Table) -> str:
    """A ``figure`` with the table."""
    return grid_to_html(to_grid(table))


FORMATS: dict[str, Callable[[Table], str]] = {"md": to_markdown, "csv": to_csv, "latex": to_latex, "html": to_html}
