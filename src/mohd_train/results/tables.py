"""The paper's tables, from a sweep or from stored results: our numbers, the paper's, the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.errors import UserError
from mohd_train.model.count import count
from mohd_train.results import store
from mohd_train.results.output import local_copy
from mohd_train.results.paper import load_numbers, load_paper, oddities
from mohd_train.results.scores import Scores, build_scores, short_count
from mohd_train.results.suite import load_suite
from mohd_train.results.sweep_results import (
    Mean,
    RunResult,
    SweepResults,
    is_sweep,
    merged_tasks,
    missing_tasks,
    read_sweep_results,
)
from mohd_train.results.table import Number, Table
from mohd_train.storage import refuse_remote


def table_text(number: int, sources: Sequence[Path | str], form: str) -> str:
    """The text of Table ``number``; the paper's own if there are no sources.

    Args:
        sources: the folder of a launched sweep; for Table 2 also result files and folders, also on object storage.
        form: md, csv, latex or html.

    Raises:
        UserError: sources that aren't what the table needs.
    """
    if number == 2:
        return table2(sources).to_table().render(form)
    if len(sources) > 1:
        raise UserError(f"Table {number} is of one sweep; give one folder, not {len(sources)}")
    for source in sources:
        refuse_remote(source, "the sweep", "copy it here first (aws s3 sync s3://... FOLDER)")
    found = read_sweep_results(Path(sources[0])) if sources else None
    return TABLES[number](load_numbers(), found).render(form)


def subjects_text(sources: Sequence[Path | str], form: str) -> str:
    """MMLU by subject: a row each, with a column for each model; then both means.

    Args:
        sources: the folder of a launched sweep, or result files and folders.
        form: md, csv, latex or html.

    Raises:
        UserError: no results of a task with subjects.
    """
    suite = load_suite()
    found = merged_tasks(read_sweep_results(Path(sources[0]))) if is_sweep(sources) else _stored(sources).results
    ours = [one for one in found if suite.tasks[one.settings.task].subjects]
    if not ours:
        raise UserError("no results of a task with subjects (mmlu) there; mohd eval --tasks mmlu makes them")
    names = [one.model["name"] for one in ours]
    labels = [
        name if names.count(name) == 1 else f"{name} [{one.model['fingerprint'][:6]}]"
        for name, one in zip(names, ours, strict=True)
    ]
    table = Table("MMLU by subject, accuracy in percent", ["Subject", "Questions", *labels])
    for subject in sorted({subject for one in ours for subject in one.subject_scores}):
        each = [one.subject_scores.get(subject, {}) for one in ours]
        counts = {f"{count:.0f}" for scores in each if (count := scores.get("questions")) is not None}
        table.add(subject, " / ".join(sorted(counts)), *(_percent(scores, "acc") for scores in each))
    table.add("mean over questions", None, *(_percent(one.scores, "acc") for one in ours))
    table.add("mean over subjects", None, *(_percent(one.scores, "acc_macro") for one in ours))
    return table.render(form)


def _percent(scores: Mapping[str, float | None], metric: str) -> Number | None:
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    return None if value is None else Number(100 * value, 1, None if error is None else 100 * error)


def _stored(sources: Sequence[Path | str]) -> store.Found:
    return store.find([local_copy(source) for source in sources])


def table2(sources: Sequence[Path | str]) -> Scores:
    """Table 2 of a sweep, of stored results, or the paper's own."""
    if is_sweep(sources):
        return table2_of(read_sweep_results(Path(sources[0])))
    found = _stored(sources)
    scores = build_scores(load_suite(), load_paper(), found.results, paper_only=not sources, missing=found.missing)
    scores.remarks = found.notes
    return scores


def table2_of(found: SweepResults) -> Scores:
    """Table 2 of a sweep. Raises UserError if none of its runs has been evaluated."""
    merged = merged_tasks(found)
    if not merged:
        raise UserError(f"{found.folder} has no results of the ten tasks yet; mohd eval --sweep {found.folder}")
    scores = build_scores(load_suite(), load_paper(), merged, missing=missing_tasks(found))
    scale = f"ours at the {found.scale} scale: not the paper's models, their proportions"
    scores.remarks = [*([] if found.scale == "paper" else [scale]), *found.notes]
    return scores


def _title(text: str, found: SweepResults | None) -> str:
    return f"{text}. Ours: {found.name} at the {found.scale} scale" if found else f"{text} (the paper's)"


def _notes(found: SweepResults | None, perplexity: bool = False) -> list[str | tuple[str, str]]:
    if found is None:
        return []
    notes = []
    if perplexity:
        notes.append(f"Validation perplexity, all domains: ours from {found.perplexity_source()[0]}.")
        if any(len(runs) > 1 for runs in found.groups().values()):
            notes.append("± is the standard error over seeds.")
        for (model, setting), runs in found.groups().items():
            value = found.perplexity(runs)
            if value is not None and value.n < len(runs):
                notes.append(f"{model}-{setting}: the perplexity is of {value.n} seeds, not {len(runs)}.")
    if any(run.status.state != "finished" and run.status.batch for run in found.runs):
        notes.append("† not finished.")
    return [*notes, *(f"{note}." for note in found.notes)]


def _plans(found: SweepResults | None) -> dict[tuple[str, str], ModelPlan]:
    return {(runs[0].base, runs[0].setting): runs[0].plan for runs in found.groups().values()} if found else {}


def table1(paper: dict[str, Any], found: SweepResults | None) -> Table:
    """The base models."""
    headers = ["Model", "Hidden", "Intermediate", "Heads", "KV heads", "Layers", "# Activate", "# Params"]
    table = Table(_title("Table 1: base models", found), headers, notes=_notes(found))
    plans = {base: plan for (base, setting), plan in _plans(found).items() if setting == "dense"}
    keys = ("hidden_size", "intermediate_size", "attention_heads", "kv_heads", "layers")
    for row in paper["table1_baselines"]:
        plan = plans.pop(row["name"].lower(), None)
        if plan is not None:
            _table1_row(table, plan)
        if plan is not None or found is None:
            label = f"{row['name']}, paper" if found else row["name"]
            table.add(label, *(str(row[key]) for key in keys), row["activated"], row["params"], faint=found is not None)
    for plan in plans.values():
        _table1_row(table, plan)
    return table


def _table1_row(table: Table, plan: ModelPlan) -> None:
    counts, heads = count(plan), (plan.num_attention_heads, plan.num_key_value_heads)
    sizes = (plan.hidden_size, plan.intermediate_size, *heads, plan.num_hidden_layers)
    table.add(plan.name, *map(str, sizes), short_count(counts.activated), short_count(counts.total))


def table3(paper: dict[str, Any], found: SweepResults | None) -> Table:
    """The settings: a row for each of the paper's columns."""
    headers = [
        "Setting",
        "Attention top-k",
        "Attention N",
        "FFN top-k",
        "FFN N",
        "Shared",
        "Group fusion dim",
        "Active",
    ]
    table = Table(_title("Table 3: MoHD settings", found), headers, notes=_notes(found))
    printed = paper["table3_mohd_settings"]
    keys = ("attention_top_k", "attention_sub_dims", "ffn_top_k", "ffn_sub_dims", "shared_sub_dims", "group_fusion_dim")
    ours = {setting: plan for (_, setting), plan in _plans(found).items() if plan.components}
    for i, column in enumerate(printed["columns"]):
        plan = ours.pop(column.rstrip("%"), None)
        if plan is not None:
            _table3_row(table, column, plan)
        if plan is not None or found is None:
            share = printed["attention_top_k"][i] / printed["attention_sub_dims"][i]
            label = f"{column}, paper" if found else column
            table.add(label, *(str(printed[key][i]) for key in keys), f"{share:.0%}", faint=found is not None)
    if any(str(row[0]).startswith("75%") for row in table.rows):
        table.notes += oddities(paper, 3)
    for setting, plan in ours.items():
        _table3_row(table, setting, plan)
    return table


def _table3_row(table: Table, name: str, plan: ModelPlan) -> None:
    def each(value: Callable[[SubDimPlan], str]) -> str:
        """Of attention and FFN; once if they are the same."""
        return " / ".join(dict.fromkeys(value(part) for part in plan.components))

    sizes = [
        size for part in (plan.attention, plan.ffn) for size in ((part.top_k, part.sub_dims) if part else (None, None))
    ]
    table.add(
        name,
        *(None if size is None else str(size) for size in sizes),
        each(lambda part: str(part.shared)),
        None if plan.fusion == "none" else each(lambda part: str(part.group_fusion_dim)),
        each(lambda part: f"{part.top_k / part.sub_dims:.0%}"),
    )


def _number(value: Mean | None) -> Number | None:
    """``10.25``, ``10.25 ± 0.03``; with a dagger if no seed has finished."""
    return None if value is None else Number(value.value, error=value.error, unfinished=bool(value.unfinished))


def _signed(value: float | None) -> Number | None:
    """``+0.83``, ``−0.18``."""
    return None if value is None else Number(value, signed=True)


def _delta(found: SweepResults, runs: list[RunResult], reference: list[RunResult]) -> Number | None:
    """The change in perplexity, with a dagger if either side has one."""
    ours, base = found.perplexity(runs), found.perplexity(reference)
    if ours is None or base is None or runs == reference:
        return None
    return Number(ours.value - base.value, signed=True, unfinished=bool(ours.unfinished or base.unfinished))


def _difference(ours: Number | None, theirs: float | None) -> Number | None:
    """Ours minus the paper's."""
    return replace(ours, value=ours.value - theirs) if ours is not None and theirs is not None else None


def table4(paper: dict[str, Any], found: SweepResults | None) -> Table:
    """The ablations: perplexity, and the change from the complete MoHD x2."""
    printed = paper["table4_ablation"]
    headers = ["Method", "PPL", "Δ", *(["PPL, paper", "Δ, paper", "Difference of Δ"] if found else [])]
    table = Table(_title("Table 4: ablations of MoHD x2", found), headers, notes=_notes(found, perplexity=True))
    for row in printed["rows"]:
        theirs = (Number(row["perplexity"]), _signed(row.get("delta")))
        if found is None:
            table.add(row["method"], *theirs)
            continue
        setting = {printed["model"]: "x2", "LLaMA2-355M": "dense"}.get(row["method"])
        runs = found.of(setting) if setting else [run for run in found.runs if run.label == row["method"]]
        delta = _delta(found, runs, found.of("x2"))
        ours = (_number(found.perplexity(runs)), delta)
        table.add(row["method"], *ours, *theirs, _difference(delta, row.get("delta")))
    if found is not None:
        table.stress_least(1)
    return table


def table5(paper: dict[str, Any], found: SweepResults | None) -> Table:
    """Attention and FFN compressed separately: perplexity, and the change from LLaMA."""
    headers = ["Attention - FFN", "# Activate", "PPL", "Δ"]
    headers += ["# Activate, paper", "PPL, paper", "Δ, paper", "Difference of Δ"] if found else []
    notes = [*_notes(found, perplexity=True), *oddities(paper, 5)]
    table = Table(_title("Table 5: attention and FFN compressed apart", found), headers, notes=notes)
    for row in paper["table5_decoupled"]["rows"]:
        label = f"{row['attention']} - {row['ffn']}"
        theirs = (row["activated"], Number(row["perplexity"]), _signed(row.get("delta")))
        if found is None:
            table.add(label, *theirs)
            continue
        attention, ffn = (row[part].rstrip("%") for part in ("attention", "ffn"))
        runs = found.of(attention if attention == ffn else f"attn{attention}-ffn{ffn}")
        activated = short_count(count(runs[0].plan).activated) if runs else None
        delta = _delta(found, runs, found.of("dense"))
        ours = (activated, _number(found.perplexity(runs)), delta)
        table.add(label, *ours, *theirs, _difference(delta, row.get("delta")))
    table.stress_least(2)
    return table


def sweep_table(found: SweepResults) -> Table:
    """Any sweep: a row for each model and setting."""
    headers = ["Model", "What", "# Activate", "# Params", "Seeds finished", "PPL", "Train loss"]
    table = Table(f"{found.title}, at the {found.scale} scale", headers, notes=_notes(found, perplexity=True))
    for (model, setting), runs in found.groups().items():
        counts = count(runs[0].plan)
        done = [run for run in runs if run.status.state == "finished"]
        losses = [run.status.loss for run in done if run.status.loss is not None]
        table.add(
            f"{model}-{setting}",
            runs[0].label,
            short_count(counts.activated),
            short_count(counts.total),
            f"{len(done)} of {len(runs)}",
            _number(found.perplexity(runs)),
            f"{sum(losses) / len(losses):.3f}" if losses else None,
        )
    table.stress_least(5)
    return table


TABLES: dict[int, Callable[[dict[str, Any], SweepResults | None], Table]] = {1: table1, 3: table3, 4: table4, 5: table5}
