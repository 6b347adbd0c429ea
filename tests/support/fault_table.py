"""What `make test-faults` ends with: each injected fault, and what the tests measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MEASURED = "fault measured"
HEAD = ("fault", "what a run does", "stopped at", "went on from", "steps lost", "recovered")
_running: list[pytest.Item] = []


def record(*, lost: int | None, stopped: int | None = None, resumed: int | None = None) -> None:
    """Takes down what the running test measured; of several records it is the last that is shown.

    Args:
        lost: steps done before the fault and done again after it; None where no training is involved.
        stopped: the last step done before the fault ended the run, resumed: the one from which it went on; None: it never stopped.
    """
    if _running:
        properties = _running[-1].user_properties
        properties[:] = [entry for entry in properties if entry[0] != MEASURED]
        properties.append((MEASURED, {"lost": lost, "stopped": stopped, "resumed": resumed}))


def measured_resume(folder: Path, before: int) -> None:
    """Records what a resumed run lost: ``before`` is the last step logged before the fault, the rest stands in ``run.json``."""
    import json

    source = json.loads((folder / "run.json").read_text())["sessions"][-1]["from"]
    resumed = int(Path(source).name.split("-")[1].removeprefix("ba")) if source else 0
    record(lost=max(before - resumed, 0), stopped=before, resumed=resumed)


def measured_whole(folder: Path, steps: int) -> None:
    """Records what a run lost that never stopped: steps of which there is no line in ``metrics.jsonl``."""
    import json

    from mohd_train.run_folder.metrics import read_metrics

    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 1
    record(lost=steps - len({line["batch"] for line in read_metrics(folder / "metrics.jsonl") if line["batch"]}))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The mark goes to the report, also across processes."""
    _running[:] = [item]
    mark = item.get_closest_marker("fault")
    if mark is not None:
        variant = f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""
        item.user_properties += [("fault", mark.args[0] + variant), ("happened", mark.kwargs["happened"])]


def _row(report: Any) -> tuple[str, ...]:
    found = dict(report.user_properties)
    measured = found.get(MEASURED)
    recovered = "NO" if not report.passed else "yes" if measured is not None else "NOT MEASURED"
    cells = [measured[key] for key in ("stopped", "resumed", "lost")] if measured else [None] * 3
    return (found["fault"], found["happened"], *("–" if cell is None else str(cell) for cell in cells), recovered)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, once there is more than one fault in it."""
    rows = []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            found = dict(getattr(report, "user_properties", ()))  # a file that can't be imported has none
            if "fault" in found and (report.when == "call" or report.failed):
                rows.append(_row(report))
    if len(rows) < 2:
        return
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(len(HEAD))]
    terminalreporter.section("faults")
    for row in [HEAD, *sorted(rows)]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
    good = sum(row[-1] == "yes" for row in rows)
    terminalreporter.write_line(
        f"{good} of {len(rows)} recovered. Steps are measured: the last one logged before the fault, and the checkpoint that the "
        "next session went on from; – where the run never stopped, or no training is involved."
    )
