"""Counts as a readable table."""

from __future__ import annotations

from rich.table import Table

from mohd_train.config.catalogue import agrees
from mohd_train.config.plan import ModelPlan
from mohd_train.model.count import Counts


def _millions(value: int) -> str:
    return f"{value / 1e6:,.2f}M"


def _against(value: int, shown: str | None) -> str:
    if shown is None:
        return _millions(value)
    return f"{_millions(value)} [dim]({shown}{'' if agrees(value, shown) else ', DIFFERS'})[/dim]"


def render_counts(rows: list[tuple[ModelPlan, Counts, dict[str, str] | None]]) -> Table:
    """One row per model; the paper's figure is in brackets where there is one."""
    table = Table(title="Parameters (in brackets: the paper's figure)", title_justify="left")
    for heading in (
        "model",
        "activated",
        "total",
        "embedding",
        "head",
        "attention",
        "ffn",
        "norms",
        "router",
        "fusion",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    table.add_column("forward FLOPs/token", justify="right", no_wrap=True)
    for plan, counts, paper in rows:
        paper = paper or {}
        parts = (
            counts.embedding,
            counts.head,
            counts.attention,
            counts.ffn,
            counts.norms,
            counts.router,
            counts.fusion,
        )
        table.add_row(
            plan.name,
            _against(counts.activated, paper.get("activated")),
            _against(counts.total, paper.get("total")),
            *map(_millions, parts),
            f"{counts.flops_per_token / 1e6:,.0f}M at {counts.seq_len}",
        )
    table.caption = (
        "activated: linear weights of the blocks that one token uses, without embedding and head; total adds both. "
        "Norms, router and fusion are in neither, as in the paper."
    )
    return table
