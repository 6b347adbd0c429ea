"""What the fault tests share, and the table that `make test-faults` ends with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from train.train_support import make_config, make_data

FULL = ("save_interval=2ba", "eval_interval=3ba", "max_duration=8ba")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run folder of an uninterrupted run of eight batches: what every recovered run must equal."""
    from mohd_train.train.run import train

    folder = tmp_path_factory.mktemp("whole")
    train(make_config(folder, data, "run_name=a", "autoresume=true", *FULL))
    return folder / "runs" / "a"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Carries each test's mark to its report, also across processes."""
    for item in items:
        mark = item.get_closest_marker("fault")
        if mark is not None:
            variant = f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""
            happened = mark.kwargs["happened"]
            item.user_properties += [
                ("fault", mark.args[0] + variant),
                ("happened", happened),
                ("lost", mark.kwargs["lost"]),
            ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """fault, what happened, steps lost, recovered."""
    rows = []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            found = dict(report.user_properties)
            if "fault" in found and (report.when == "call" or report.failed):
                rows.append((found["fault"], found["happened"], str(found["lost"]), "yes" if report.passed else "NO"))
    if len(rows) < 2:
        return
    head = ("fault", "what happened", "steps lost", "recovered")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
    terminalreporter.section("faults")
    for row in [head, *sorted(rows)]:
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    good = sum(row[3] == "yes" for row in rows)
    terminalreporter.write_line(
        f"{good} of {len(rows)} recovered, nothing lost beyond the last checkpoint where it says so"
    )
