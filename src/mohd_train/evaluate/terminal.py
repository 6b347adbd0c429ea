"""What an evaluation shows in the terminal: a line for each task, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table as RichTable

from mohd_train.results.store import Result
from mohd_train.results.suite import Suite
from mohd_train.results.table import MISSING, Number


def percent(value: float | None, stderr: float | None = None) -> str:
    """``31.1`` or ``31.1 ± 0.5``; a dash if it is missing."""
    if value is None:
        return MISSING
    return str(Number(100 * value, 1, None if stderr is None else 100 * stderr))


def one_line(result: Result, seconds: float | None) -> str:
    """The line printed when a task is done; ``seconds`` is None for a stored result."""
    metric = result.settings.metric
    shown = percent(result.scores.get(metric), result.scores.get(f"{metric}_stderr"))
    cut = (
        f", {result.truncated['requests']} of {result.truncated['of']} requests truncated"
        if result.truncated["requests"]
        else ""
    )
    if result.joined.get("requests"):
        cut += f", {result.joined['requests']} answers share a token with their question"
    how = f"{seconds:.0f} s" if seconds is not None else "reused"
    return f"{result.settings.task}: {metric} {shown} ({result.questions} questions, {how}{cut})"


def results_table(suite: Suite, results: Mapping[str, Result], failed: Mapping[str, str]) -> RichTable:
    """Task, shots, questions, accuracy ± standard error, normalized accuracy, perplexity, truncated requests and, if there are
    any, joined ones. A task with subjects has a second line: the mean that gives every subject the same weight."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    joined = ["joined"] if any(result.joined.get("requests") for result in results.values()) else []
    for header in ("task", "shots", "n", "acc (%)", "acc_norm", "ppl", "truncated", *joined):
        table.add_column(header, justify="left" if header == "task" else "right", no_wrap=True)
    for name, spec in suite.tasks.items():
        if name in failed:
            table.add_row(name, str(spec.shots), *[MISSING] * (5 + len(joined)))
        if name not in results:
            continue
        result = results[name]
        scores, cut = result.scores, result.truncated
        perplexity = scores.get("perplexity")
        table.add_row(
            name,
            str(result.settings.shots),
            str(result.questions),
            percent(scores.get("acc"), scores.get("acc_stderr")),
            percent(scores.get("acc_norm"), scores.get("acc_norm_stderr")),
            f"{perplexity:.4g}" if perplexity is not None else MISSING,
            f"{cut['requests']}/{cut['of']}" if cut["requests"] else "0",
            *([_joined(result)] if joined else []),
        )
        if "acc_macro" in scores:
            macro = percent(scores["acc_macro"], scores.get("acc_macro_stderr"))
            table.add_row("  by subject", "", str(result.subjects), macro)
    return table


def _joined(result: Result) -> str:
    """Requests whose answer shares a token with the question; a dash for results that don't have the count."""
    if not result.joined:
        return MISSING
    return f"{result.joined['requests']}/{result.truncated['of']}" if result.joined["requests"] else "0"
