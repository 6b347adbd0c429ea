"""A table, and its text as Markdown, LaTeX, CSV or HTML. A missing value is a dash (in CSV: empty), never 0."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field

MISSING = "–"
Place = tuple[int, int]  # (row, column)


@dataclass(frozen=True)
class Number:
    """A number with the digits it is shown with.

    Attributes:
        error: its standard error.
        signed: a difference, shown with its sign.
        unfinished: marked with a dagger: a run behind it has not ended.
    """

    value: float
    digits: int = 2
    error: float | None = None
    signed: bool = False
    unfinished: bool = False

    @property
    def plain(self) -> str:
        """Only the value, as a parser reads it: ``10.25``, ``-0.18``, ``+0.83``."""
        return f"{self.value:{'+' if self.signed else ''}.{self.digits}f}"

    @property
    def plain_error(self) -> str:
        """Only the standard error; empty if there is none."""
        return "" if self.error is None else f"{self.error:.{self.digits}f}"

    def __str__(self) -> str:
        """``10.25``, ``10.25 ± 0.03``, ``+0.83``, ``−0.18``, ``10.25 †``."""
        error = "" if self.error is None else f" ± {self.plain_error}"
        return self.plain.replace("-", "−") + error + (" †" if self.unfinished else "")


def _harmless(cell: object) -> object:
    """A cell that a spreadsheet doesn't run: text that begins as a formula does (a run's label may be anything) is quoted."""
    text = str(cell)
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return cell


@dataclass
class Table:
    """Headers, rows of the same length, notes below. The first column is text, the others hold numbers.

    Attributes:
        notes: lines below the table; (letter, text) explains a letter of ``marks``.
        bold: cells to emphasize.
        faint: rows that aren't ours, such as the paper's.
        marks: letters behind a cell (``"a,c"``) that lead to notes.
        groups: (name, number of columns) over all columns, for a line below the headers; no name: no group.
        blocks: rows that begin a block, which LaTeX sets apart with a rule.
        records: what CSV holds, header first, where that isn't the shown columns.
        captioned: whether Markdown and LaTeX show the title; HTML always does.
        bold_ours: whether Markdown, which has no faint rows, emphasizes the first cell of the others.
        minus: of signed numbers in Markdown and HTML.
    """

    title: str
    headers: list[str]
    rows: list[list[str | Number]] = field(default_factory=list)
    notes: list[str | tuple[str, str]] = field(default_factory=list)
    bold: set[Place] = field(default_factory=set)
    faint: set[int] = field(default_factory=set)
    marks: dict[Place, str] = field(default_factory=dict)
    groups: list[tuple[str, int]] = field(default_factory=list)
    blocks: set[int] = field(default_factory=lambda: {0})
    records: list[list[str]] | None = None
    captioned: bool = True
    bold_ours: bool = False
    minus: str = "−"

    def add(self, *cells: str | Number | None, faint: bool = False) -> None:
        """Appends a row; None is a missing value."""
        assert len(cells) == len(self.headers), (cells, self.headers)
        if faint:
            self.faint.add(len(self.rows))
        self.rows.append([MISSING if cell is None else cell for cell in cells])

    def stress_least(self, column: int) -> None:
        """Emphasizes the smallest number of a column among the rows that are ours and finished, if two or more have one."""
        numbers = {
            i: cell.value
            for i, row in enumerate(self.rows)
            if isinstance(cell := row[column], Number) and not cell.unfinished and i not in self.faint
        }
        if len(numbers) > 1:
            least = min(numbers.values())
            self.bold |= {(row, column) for row, number in numbers.items() if number == least}

    def render(self, form: str) -> str:
        """The text in one of :data:`FORMS`."""
        return FORMS[form](self)

    def to_markdown(self) -> str:
        """A Markdown table, with its title above it and the notes below."""

        def shown(i: int, j: int, cell: str | Number) -> str:
            stressed = (i, j) in self.bold or (j == 0 and self.bold_ours and i not in self.faint)
            text = f"**{self._text(cell)}**" if stressed else self._text(cell)
            return text + (f" <sup>{self.marks[i, j]}</sup>" if (i, j) in self.marks else "")

        body = [[shown(i, j, cell) for j, cell in enumerate(row)] for i, row in enumerate(self.rows)]
        groups = [name and f"*{name}*" if i == 0 else "" for name, size in self.groups for i in range(size)]
        rule = ["---", *["---:"] * (len(self.headers) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.headers, rule, *([groups] if groups else []), *body)]
        notes = [note if isinstance(note, str) else f"<sup>{note[0]}</sup> {note[1]}" for note in self.notes]
        title = [f"**{self.title}**", ""] if self.captioned else []
        return "\n".join([*title, *lines, "", "  \n".join(notes)]).rstrip() + "\n"

    def to_csv(self) -> str:
        """One number per column: a standard error has the column ``HEADER stderr``, a dagger becomes an entry of the
        last column, ``unfinished``. The notes are left to the other forms."""
        out = io.StringIO()
        records = [[_harmless(cell) for cell in record] for record in self.records or self._records()]
        csv.writer(out, lineterminator="\n").writerows(records)
        return out.getvalue()

    def _records(self) -> list[list[str]]:
        numbers = [[cell if isinstance(cell, Number) else None for cell in row] for row in self.rows]
        with_error = {j for row in numbers for j, cell in enumerate(row) if cell and cell.error is not None}
        daggers = any(cell and cell.unfinished for row in numbers for cell in row)
        lines = [
            [
                name
                for j, header in enumerate(self.headers)
                for name in [header, f"{header} stderr"][: 1 + (j in with_error)]
            ]
        ]
        lines[0] += ["unfinished"] if daggers else []
        for row, parsed in zip(self.rows, numbers, strict=True):
            line: list[str] = []
            for j, (cell, number) in enumerate(zip(row, parsed, strict=True)):
                line.append(number.plain if number else "" if cell == MISSING else str(cell))
                line += [number.plain_error if number else ""] if j in with_error else []
            unfinished = [self.headers[j] for j, number in enumerate(parsed) if number and number.unfinished]
            lines.append([*line, *(["; ".join(unfinished)] if daggers else [])])
        return lines

    def to_latex(self) -> str:
        """A `tabular` in booktabs style; title and notes as text around it."""

        def shown(i: int, j: int, cell: str | Number) -> str:
            number = isinstance(cell, Number) and cell.signed and self.minus == "-"
            text = f"${cell.plain}$" if number else _tex(str(cell))  # type: ignore[union-attr]
            text = rf"\textbf{{{text}}}" if (i, j) in self.bold else text
            return text + (f"$^{{{self.marks[i, j]}}}$" if (i, j) in self.marks else "")

        lines = [f"% {self.title}"] if self.captioned else []
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.headers) - 1)}}}", r"\toprule"]
        if self.groups:
            over = [
                rf"\multicolumn{{{n}}}{{c}}{{{_tex(name)}}}" if name else " & " * (n - 1) for name, n in self.groups
            ]
            lines.append(" ".join(f"{' & '.join(over)} \\\\".split()))
        lines.append(" & ".join(map(_tex, self.headers)) + r" \\")
        for i, row in enumerate(self.rows):
            lines += [r"\midrule"] if i in self.blocks else []
            lines.append(" & ".join(shown(i, j, cell) for j, cell in enumerate(row)) + r" \\")
        notes = [_tex(note) if isinstance(note, str) else rf"$^{{{note[0]}}}$ {_tex(note[1])}" for note in self.notes]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", "", "\\\\\n".join(notes)]).rstrip() + "\n"

    def to_html(self) -> str:
        """A ``figure`` with the table and its notes: a part of a page, without a style of its own."""

        def shown(i: int, j: int, cell: str | Number) -> str:
            text = html.escape(self._text(cell) + (f" ({self.marks[i, j]})" if (i, j) in self.marks else ""))
            return f"<td>{f'<b>{text}</b>' if (i, j) in self.bold else text}</td>"

        headers = "".join(f"<th>{html.escape(header)}</th>" for header in self.headers)
        rows = "".join(
            f"<tr{' class=paper' if i in self.faint else ''}>"
            + "".join(shown(i, j, cell) for j, cell in enumerate(row))
            + "</tr>\n"
            for i, row in enumerate(self.rows)
        )
        notes = [note if isinstance(note, str) else f"({note[0]}) {note[1]}" for note in self.notes]
        below = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in notes)
        table = f"<div class=scroll><table>\n<thead><tr>{headers}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>"
        return f"<figure class=table>\n<figcaption>{html.escape(self.title)}</figcaption>\n{table}\n{below}</figure>\n"

    def _text(self, cell: str | Number) -> str:
        return str(cell).replace("−", self.minus) if isinstance(cell, Number) else cell


_TEX: dict[str, str | int | None] = {
    "\\": r"\textbackslash ",
    **{plain: f"\\{plain}" for plain in "&%#_"},
    MISSING: "--",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"$\dagger$",
    "Δ": r"$\Delta$",
    "×": r"$\times$",
}


def _tex(text: str) -> str:
    return text.translate(str.maketrans(_TEX))


FORMS: dict[str, Callable[[Table], str]] = {
    "md": Table.to_markdown,
    "csv": Table.to_csv,
    "latex": Table.to_latex,
    "html": Table.to_html,
}
