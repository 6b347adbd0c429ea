"""A table as rows of text: Markdown, LaTeX, CSV and HTML from one form."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field

MISSING = "–"


@dataclass
class Grid:
    """A title, heads, rows of equal length (the first column is text, the others numbers) and notes below.

    Attributes:
        bold: (row, column) of the cells to stress.
        faint: rows that are not ours, such as the paper's.
    """

    title: str
    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)
    faint: set[int] = field(default_factory=set)

    def add(self, *cells: str | None, faint: bool = False) -> None:
        """A row; None is a dash."""
        assert len(cells) == len(self.heads), (cells, self.heads)
        if faint:
            self.faint.add(len(self.rows))
        self.rows.append([MISSING if cell is None else cell for cell in cells])

    def stress_least(self, column: int, rows: list[int] | None = None) -> None:
        """Marks the smallest number of a column, over ``rows`` (default: all that are not faint), where two or more have one."""
        numbers = {}
        for row in rows if rows is not None else [i for i in range(len(self.rows)) if i not in self.faint]:
            try:
                numbers[row] = float(self.rows[row][column].split()[0])
            except (ValueError, IndexError):
                continue
        if len(numbers) > 1:
            least = min(numbers.values())
            self.bold |= {(row, column) for row, number in numbers.items() if number == least}


def to_markdown(grid: Grid) -> str:
    """A Markdown table under its title."""

    def shown(i: int, j: int, cell: str) -> str:
        return f"**{cell}**" if (i, j) in grid.bold else cell

    lines = ["| " + " | ".join(grid.heads) + " |", "| --- |" + " ---: |" * (len(grid.heads) - 1)]
    lines += [
        "| " + " | ".join(shown(i, j, cell) for j, cell in enumerate(row)) + " |" for i, row in enumerate(grid.rows)
    ]
    return "\n".join([f"**{grid.title}**", "", *lines, "", *(f"{note}  " for note in grid.notes)]).rstrip() + "\n"


def to_csv(grid: Grid) -> str:
    """Heads, rows; notes are left to the other forms."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(grid.heads)
    writer.writerows(["" if cell == MISSING else cell for cell in row] for row in grid.rows)
    return out.getvalue()


def _tex(text: str) -> str:
    text = text.replace("\\", r"\textbackslash ")
    for plain in "&%#_":
        text = text.replace(plain, f"\\{plain}")
    return (
        text.replace(MISSING, "--")
        .replace("±", r"$\pm$")
        .replace("−", "$-$")
        .replace("Δ", r"$\Delta$")
        .replace("×", r"$\times$")
    )


def to_latex(grid: Grid) -> str:
    """A booktabs ``tabular``; title and notes as text around it."""

    def shown(i: int, j: int, cell: str) -> str:
        return rf"\textbf{{{_tex(cell)}}}" if (i, j) in grid.bold else _tex(cell)

    body = [" & ".join(shown(i, j, cell) for j, cell in enumerate(row)) + r" \\" for i, row in enumerate(grid.rows)]
    lines = [f"% {grid.title}", rf"\begin{{tabular}}{{l{'r' * (len(grid.heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, grid.heads)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*lines, *(f"{_tex(note)}\\\\" for note in grid.notes)]).rstrip() + "\n"


def to_html(grid: Grid) -> str:
    """A ``figure`` with table and notes: a part of a page, without style of its own."""

    def shown(i: int, j: int, cell: str) -> str:
        text = html.escape(cell)
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
