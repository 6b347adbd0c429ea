"""A table as rows of text: Markdown, LaTeX, CSV and HTML from one form."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field

MISSING = "–"


@dataclass(frozen=True)
class Number:
    """A number with the digits it is shown with.

    Attributes:
        error: its standard error.
        signed: a difference, shown with its sign.
        unfinished: marked with a dagger: a run behind it has not reached its end.
    """

    value: float
    digits: int = 2
    error: float | None = None
    signed: bool = False
    unfinished: bool = False

    @property
    def plain(self) -> str:
        """The value alone, as a parser reads it: ``10.25``, ``-0.18``, ``+0.83``."""
        return f"{self.value:{'+' if self.signed else ''}.{self.digits}f}"

    def __str__(self) -> str:
        """``10.25``, ``10.25 ± 0.03``, ``+0.83``, ``−0.18``, ``10.25 †``."""
        error = "" if self.error is None else f" ± {self.error:.{self.digits}f}"
        return self.plain.replace("-", "−") + error + (" †" if self.unfinished else "")


@dataclass
class Grid:
    """A title, heads, rows of equal length (the first column is text, the others numbers) and notes below.

    Attributes:
        bold: (row, column) of the cells to stress.
        faint: rows that are not ours, such as the paper's.
    """

    title: str
    heads: list[str]
    rows: list[list[str | Number]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)
    faint: set[int] = field(default_factory=set)

    def add(self, *cells: str | Number | None, faint: bool = False) -> None:
        """A row; None is a dash."""
        assert len(cells) == len(self.heads), (cells, self.heads)
        if faint:
            self.faint.add(len(self.rows))
        self.rows.append([MISSING if cell is None else cell for cell in cells])

    def stress_least(self, column: int) -> None:
        """Marks the smallest number of a column over the rows that are ours and finished, where two or more have one."""
        numbers = {
            i: cell.value
            for i, row in enumerate(self.rows)
            if isinstance(cell := row[column], Number) and not cell.unfinished and i not in self.faint
        }
        if len(numbers) > 1:
            least = min(numbers.values())
            self.bold |= {(row, column) for row, number in numbers.items() if number == least}


def to_markdown(grid: Grid) -> str:
    """A Markdown table under its title."""

    def shown(i: int, j: int, cell: str | Number) -> str:
        return f"**{cell}**" if (i, j) in grid.bold else str(cell)

    lines = ["| " + " | ".join(grid.heads) + " |", "| --- |" + " ---: |" * (len(grid.heads) - 1)]
    lines += [
        "| " + " | ".join(shown(i, j, cell) for j, cell in enumerate(row)) + " |" for i, row in enumerate(grid.rows)
    ]
    return "\n".join([f"**{grid.title}**", "", *lines, "", *(f"{note}  " for note in grid.notes)]).rstrip() + "\n"


def to_csv(grid: Grid) -> str:
    """Heads, rows; a missing value is empty. Every number stands alone: its standard error has the column ``HEAD stderr``, a
    dagger becomes an entry of the last column, ``unfinished``. Notes are left to the other forms."""
    cells = [[cell if isinstance(cell, Number) else None for cell in row] for row in grid.rows]
    with_error = {j for row in cells for j, cell in enumerate(row) if cell and cell.error is not None}
    daggers = any(cell and cell.unfinished for row in cells for cell in row)
    heads = [name for j, head in enumerate(grid.heads) for name in [head, f"{head} stderr"][: 1 + (j in with_error)]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*heads, *(["unfinished"] if daggers else [])])
    for row, numbers in zip(grid.rows, cells, strict=True):
        line: list[str] = []
        for j, (cell, number) in enumerate(zip(row, numbers, strict=True)):
            line.append(number.plain if number else "" if cell == MISSING else str(cell))
            if j in with_error:
                line.append("" if number is None or number.error is None else f"{number.error:.{number.digits}f}")
        unfinished = [grid.heads[j] for j, number in enumerate(numbers) if number and number.unfinished]
        writer.writerow([*line, *(["; ".join(unfinished)] if daggers else [])])
    return out.getvalue()


def _tex(cell: str | Number) -> str:
    text = str(cell).replace("\\", r"\textbackslash ")
    for plain in "&%#_":
        text = text.replace(plain, f"\\{plain}")
    return (
        text.replace(MISSING, "--")
        .replace("±", r"$\pm$")
        .replace("−", "$-$")
        .replace("†", r"$\dagger$")
        .replace("Δ", r"$\Delta$")
        .replace("×", r"$\times$")
    )


def to_latex(grid: Grid) -> str:
    """A booktabs ``tabular``; title and notes as text around it."""

    def shown(i: int, j: int, cell: str | Number) -> str:
        return rf"\textbf{{{_tex(cell)}}}" if (i, j) in grid.bold else _tex(cell)

    body = [" & ".join(shown(i, j, cell) for j, cell in enumerate(row)) + r" \\" for i, row in enumerate(grid.rows)]
    lines = [f"% {grid.title}", rf"\begin{{tabular}}{{l{'r' * (len(grid.heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, grid.heads)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*lines, *(f"{_tex(note)}\\\\" for note in grid.notes)]).rstrip() + "\n"


def to_html(grid: Grid) -> str:
    """A ``figure`` with table and notes: a part of a page, without style of its own."""

    def shown(i: int, j: int, cell: str | Number) -> str:
        text = html.escape(str(cell))
        return f"<td>{f'<b>{text}</b>' if (i, j) in grid.bold else text}</td>"

    def mark(i: int) -> str:
        return " class=paper" if i in grid.faint else ""

    heads = "".join(f"<th>{html.escape(head)}</th>" for head in grid.heads)
    rows = "".join(
        f"<tr{mark(i)}>" + "".join(shown(i, j, cell) for j, cell in enumerate(row)) + "</tr>\n"
        for i, row in enumerate(grid.rows)
    )
    notes = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in grid.notes)
    table = f"<div class=scroll><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>"
    return f"<figure class=table>\n<figcaption>{html.escape(grid.title)}</figcaption>\n{table}\n{notes}</figure>\n"


FORMATS: dict[str, Callable[[Grid], str]] = {"md": to_markdown, "csv": to_csv, "latex": to_latex, "html": to_html}
