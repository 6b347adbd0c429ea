"""Tables 1, 3, 4 and 5: the paper's layout, our numbers, the paper's, the difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.errors import UserError
from mohd_train.evaluate.grid import Grid, Number
from mohd_train.evaluate.paper import DEFAULT_PAPER
from mohd_train.evaluate.sweep_results import Mean, RunResult, SweepResults
from mohd_train.evaluate.tables import count as short_count
from mohd_train.model.count import count

ODDITIES = {  # words of an oddity in results.yaml -> the table whose note it is
    "Table 2": 2, "Table 3": 3, "Table 5": 5,
}  # fmt: skip


def load_numbers(path: Path = DEFAULT_PAPER) -> dict[str, Any]:
    """The paper's numbers, whole. Raises UserError where the file is missing or broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: the paper's numbers can't be read ({str(error).splitlines()[0]})") from None


def oddities(paper: dict[str, Any], table: int) -> list[str]:
    """The paper's own oddities that belong to a table, as notes."""
    return [
        f"The paper: {text}."
        for text in paper["oddities"]
        if any(w in text and n == table for w, n in ODDITIES.items())
    ]


def number(value: Mean | None) -> Number | None:
    """``10.25``, ``10.25 ± 0.03``; with a dagger where no seed has finished."""
    return None if value is None else Number(value.value, error=value.error, unfinished=bool(value.unfinished))


def signed(value: float | None) -> Number | None:
    """``+0.83``, ``−0.18``."""
    return None if value is None else Number(value, signed=True)


def _title(text: str, found: SweepResults | None) -> str:
    return f"{text}. Ours: {found.name} at the {found.scale} scale" if found else f"{text} (the paper's)"


def _notes(found: SweepResults | None, perplexity: bool = False) -> list[str]:
    if found is None:
        return []
    notes = []
    if perplexity:
        notes.append(f"Validation perplexity, all domains: ours from {found.perplexity_source()[0]}.")
        seeds = sorted({len(runs) for runs in found.groups().values()})
        if seeds[-1] > 1:
            notes.append("± is the standard error over seeds.")
        for (model, setting), runs in found.groups().items():
            value = found.perplexity(runs)
            if value is not None and value.n < len(runs):
                notes.append(f"{model}-{setting}: the perplexity is of {value.n} seeds, not {len(runs)}.")
    if any(run.status.state != "finished" and run.status.batch for run in found.runs):
        notes.append("† not finished.")
    return notes + [f"{note}." for note in found.notes]


def _plans(found: SweepResults) -> dict[tuple[str, str], ModelPlan]:
    return {(runs[0].base, runs[0].setting): runs[0].plan for runs in found.groups().values()}


def table1(paper: dict[str, Any], found: SweepResults | None) -> Grid:
    """The base models."""
    heads = ["Model", "Hidden", "Intermediate", "Heads", "KV heads", "Layers", "# Activate", "# Params"]
    grid = Grid(_title("Table 1: base models", found), heads, notes=_notes(found))
    plans = {base: plan for (base, setting), plan in _plans(found).items() if setting == "dense"} if found else {}
    keys = ("hidden_size", "intermediate_size", "attention_heads", "kv_heads", "layers")
    for row in paper["table1_baselines"]:
        plan = plans.pop(row["name"].lower(), None)
        if plan is not None:
            _table1_row(grid, plan)
        if plan is not None or found is None:
            label = f"{row['name']}, paper" if found else row["name"]
            grid.add(label, *(str(row[key]) for key in keys), row["activated"], row["params"], faint=found is not None)
    for plan in plans.values():
        _table1_row(grid, plan)
    return grid


def _table1_row(grid: Grid, plan: ModelPlan) -> None:
    counts = count(plan)
    sizes = (
        plan.hidden_size,
        plan.intermediate_size,
        plan.num_attention_heads,
        plan.num_key_value_heads,
        plan.num_hidden_layers,
    )
    grid.add(plan.name, *map(str, sizes), short_count(counts.activated), short_count(counts.total))


def table3(paper: dict[str, Any], found: SweepResults | None) -> Grid:
    """The settings: a row for each, where the paper has a column."""
    heads = ["Setting", "Attention top-k", "Attention N", "FFN top-k", "FFN N", "Shared", "Group fusion dim", "Active"]
    grid = Grid(_title("Table 3: MoHD settings", found), heads, notes=_notes(found))
    table = paper["table3_mohd_settings"]
    keys = ("attention_top_k", "attention_sub_dims", "ffn_top_k", "ffn_sub_dims", "shared_sub_dims", "group_fusion_dim")
    ours = {setting: plan for (_, setting), plan in _plans(found).items() if plan.components} if found else {}
    for i, column in enumerate(table["columns"]):
        plan = ours.pop(column.rstrip("%"), None)
        if plan is not None:
            _table3_row(grid, column, plan)
        if plan is not None or found is None:
            share = table["attention_top_k"][i] / table["attention_sub_dims"][i]
            label = f"{column}, paper" if found else column
            grid.add(label, *(str(table[key][i]) for key in keys), f"{share:.0%}", faint=found is not None)
    if any(str(row[0]).startswith("75%") for row in grid.rows):
        grid.notes += oddities(paper, 3)
    for setting, plan in ours.items():
        _table3_row(grid, setting, plan)
    return grid


def _table3_row(grid: Grid, name: str, plan: ModelPlan) -> None:
    def of(part: SubDimPlan | None, get: Callable[[SubDimPlan], object]) -> str | None:
        return None if part is None else str(get(part))

    a, f = plan.attention, plan.ffn
    either = f or a
    assert either is not None
    shared = either.shared if (a is None or f is None or a.shared == f.shared) else f"{a.shared} / {f.shared}"
    active = " / ".join(dict.fromkeys(f"{p.top_k / p.sub_dims:.0%}" for p in (a, f) if p))
    fusion = " / ".join(dict.fromkeys(str(p.group_fusion_dim) for p in (a, f) if p)) if plan.fusion != "none" else None
    top_n = (
        of(a, lambda p: p.top_k),
        of(a, lambda p: p.sub_dims),
        of(f, lambda p: p.top_k),
        of(f, lambda p: p.sub_dims),
    )
    grid.add(name, *top_n, str(shared), fusion, active)


def _find(found: SweepResults | None, matches: Callable[[RunResult], bool]) -> list[RunResult]:
    return [run for run in found.runs if matches(run)] if found else []


def _delta(found: SweepResults, runs: list[RunResult], reference: list[RunResult]) -> Number | None:
    """The change in perplexity; with the dagger of either side."""
    ours, base = found.perplexity(runs), found.perplexity(reference)
    if ours is None or base is None or runs == reference:
        return None
    return Number(ours.value - base.value, signed=True, unfinished=bool(ours.unfinished or base.unfinished))


def _difference(ours: Number | None, theirs: float | None) -> Number | None:
    """Ours less the paper's."""
    return replace(ours, value=ours.value - theirs) if ours is not None and theirs is not None else None


def table4(paper: dict[str, Any], found: SweepResults | None) -> Grid:
    """The ablations: perplexity, and the change against the whole MoHD x2."""
    table = paper["table4_ablation"]
    if found is None:
        grid = Grid(_title("Table 4: ablations of MoHD x2", None), ["Method", "PPL", "Δ"])
        for row in table["rows"]:
            grid.add(row["method"], Number(row["perplexity"]), signed(row.get("delta")))
        return grid
    heads = ["Method", "PPL", "Δ", "PPL, paper", "Δ, paper", "Difference of Δ"]
    grid = Grid(_title("Table 4: ablations of MoHD x2", found), heads, notes=_notes(found, perplexity=True))
    whole = _find(found, lambda run: run.setting == "x2")
    for row in table["rows"]:
        setting = {table["model"]: "x2", "LLaMA2-355M": "dense"}.get(row["method"])
        runs = _find(found, lambda run, s=setting, m=row["method"]: run.setting == s if s else run.label == m)  # type: ignore[misc]
        delta, theirs = _delta(found, runs, whole), row.get("delta")
        value, printed = number(found.perplexity(runs)), Number(row["perplexity"])
        grid.add(row["method"], value, delta, printed, signed(theirs), _difference(delta, theirs))
    grid.stress_least(1)
    return grid


def table5(paper: dict[str, Any], found: SweepResults | None) -> Grid:
    """Attention and FFN apart: perplexity, and the change against LLaMA."""
    table = paper["table5_decoupled"]
    ours = ["# Activate", "PPL", "Δ"]
    heads = (
        ["Attention - FFN", *ours]
        if found is None
        else ["Attention - FFN", *ours, "# Activate, paper", "PPL, paper", "Δ, paper", "Difference of Δ"]
    )
    notes = [*_notes(found, perplexity=True), *oddities(paper, 5)]
    grid = Grid(_title("Table 5: attention and FFN compressed apart", found), heads, notes=notes)
    dense = _find(found, lambda run: run.setting == "dense")
    for row in table["rows"]:
        label = f"{row['attention']} - {row['ffn']}"
        theirs = (row["activated"], Number(row["perplexity"]), signed(row.get("delta")))
        if found is None:
            grid.add(label, *theirs)
            continue
        a, f = (row[part].rstrip("%") for part in ("attention", "ffn"))
        setting = a if a == f else f"attn{a}-ffn{f}"
        runs = _find(found, lambda run, s=setting: run.setting == s)  # type: ignore[misc]
        delta = _delta(found, runs, dense)
        difference = _difference(delta, row.get("delta"))
        activated = short_count(count(runs[0].plan).activated) if runs else None
        grid.add(label, activated, number(found.perplexity(runs)), delta, *theirs, difference)
    grid.stress_least(2)
    return grid


def sweep_grid(found: SweepResults) -> Grid:
    """Any sweep: a row for each model and setting, with what every table has."""
    heads = ["Model", "What", "# Activate", "# Params", "Seeds finished", "PPL", "Train loss"]
    grid = Grid(f"{found.title}, at the {found.scale} scale", heads, notes=_notes(found, perplexity=True))
    for (model, setting), runs in found.groups().items():
        counts = count(runs[0].plan)
        done = [run for run in runs if run.status.state == "finished"]
        losses = [run.status.loss for run in done if run.status.loss is not None]
        grid.add(
            f"{model}-{setting}",
            runs[0].label,
            short_count(counts.activated),
            short_count(counts.total),
            f"{len(done)} of {len(runs)}",
            number(found.perplexity(runs)),
            f"{sum(losses) / len(losses):.3f}" if losses else None,
        )
    grid.stress_least(5)
    return grid


TABLES: dict[int, Callable[[dict[str, Any], SweepResults | None], Grid]] = {1: table1, 3: table3, 4: table4, 5: table5}
