"""What a study has shown so far: tables for a terminal and for a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mohd_train.study.compare import MEASURED, Compared, Difference, compare
from mohd_train.study.runs import Study
from mohd_train.study.statistics import Interval

HEADERS = (
    "setting",
    "variant",
    "seeds",
    "nats",
    "95% over seeds",
    "95% over documents",
    "in the 2nd half",
    "paper",
    "sign",
)
LEFT = ("setting", "variant", "in the 2nd half", "sign")
EXPLANATION = (
    "Differences of validation loss to the baseline in nats a token, paired by seed (the same initialization seed, batches and "
    "order): above 0, the setting is worse. Over seeds: Student's t of the pairs. Over documents: bootstrap of validation "
    "documents within their domains, for these trained models as they are. In the 2nd half of the tokens the difference grows "
    "or fades, or that can't be told. Paper: ln of the ratio of its perplexities. "
    "Sign: whether the paper's holds, by the interval over seeds; "
    "intervals are not widened for the number of comparisons."
)


def signed(value: float | None) -> str:
    """``+0.143``; a dash for what is missing."""
    return "–" if value is None or math.isnan(value) else f"{value:+.3f}"


def bounds(interval: Interval | None) -> str:
    """``+0.120 .. +0.166``; a dash where there are none."""
    if interval is None or interval.low is None:
        return "–"
    return f"{signed(interval.low)} .. {signed(interval.high)}"


def cells(one: Difference) -> tuple[str, ...]:
    """A difference as a row under ``HEADERS``."""
    seeds = str(len(one.seeds)) + (f" (+{len(one.under_way)})" if one.under_way else "")
    latest = "–" if one.latest is None else signed(one.latest.mean)
    if one.at_end is None and one.curve is not None:
        latest += f" at {one.curve.tokens[-1] / 1e6:.1f}M"
    return (
        one.setting, one.variant or "–", seeds, latest, bounds(one.latest), bounds(one.documents), one.direction,
        signed(one.paper), one.verdict,
    )  # fmt: skip


def grid_rows(found: Compared, models: list[str]) -> list[tuple[str, ...]]:
    """Mean losses of a grid. The lowest of a row is marked, with ``(edge)`` where the best may lie beyond the grid."""
    rows = []
    for model in models:
        for setting in found.rows:
            best = found.best(model, setting)
            values = []
            for place, variant in enumerate(found.variants):
                loss = found.grid.get((model, setting, variant))
                mark = ""
                if loss is not None and variant == best:
                    mark = " *" if 0 < place < len(found.variants) - 1 else " * (edge)"
                values.append("–" if loss is None else f"{loss.mean:.4f}{mark}")
            rows.append((setting, *values))
    return rows


def show(study: Study) -> Group:
    """Every comparison as a table for a terminal, and the notes."""
    parts: list[Table | Text] = []
    for comparison in study.comparisons:
        found = compare(study, comparison)
        grid = not found.differences
        title = found.title if grid else f"{found.title} · against {comparison.baseline}"
        table = Table(
            title=f"{title} · {found.source}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        headers = ("setting", *(variant or "–" for variant in found.variants)) if grid else HEADERS
        for header in headers:
            table.add_column(header, justify="left" if header in LEFT else "right", no_wrap=True)
        for row in grid_rows(found, study.models) if grid else map(cells, found.differences):
            table.add_row(*row)
        parts.append(table)
    if not study.comparisons:
        parts.append(Text("The sweep's file has no comparisons: docs/sweeps.md shows how to write them."))
    else:
        parts.append(Text(EXPLANATION))
    parts += [Text(f"note: {note}") for note in dict.fromkeys(study.notes)]
    return Group(*parts)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---" if header in LEFT else "---:" for header in headers]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, rule, *rows)) + "\n"


def comparisons_markdown(study: Study) -> str:
    """Every comparison as a section of a page."""
    parts = []
    for comparison in study.comparisons:
        found = compare(study, comparison)
        if not found.differences:
            headers = ("setting", *(variant or "–" for variant in found.variants))
            text = f"## {found.title}\n\nMean validation loss, nats a token: {found.source}. \\* marks the lowest of a row.\n\n"
            parts.append(
                text
                + markdown_table(
                    headers, [tuple(c.replace("*", "\\*") for c in row) for row in grid_rows(found, study.models)]
                )
            )
            continue
        source = "on every validation sample" if found.source == MEASURED else "at the last validation within training"
        text = f"## {found.title}\n\nAgainst `{comparison.baseline}`, {source}.\n\n"
        parts.append(text + markdown_table(HEADERS, [cells(one) for one in found.differences]))
    return "\n".join(parts)
