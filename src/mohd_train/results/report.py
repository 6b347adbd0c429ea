"""One self-contained HTML page about a sweep: runs, tables, figures, differences from the paper, hardware, cost, configs."""

from __future__ import annotations

import base64
import html
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from mohd_train.config.compare import config_differences
from mohd_train.errors import UserError
from mohd_train.results import figures
from mohd_train.results.paper import load_numbers
from mohd_train.results.sweep_results import RunResult, SweepResults, read_sweep_results
from mohd_train.results.table import MISSING, Table
from mohd_train.results.tables import TABLES, sweep_table, table2_of
from mohd_train.sweep.folder import SweepFolder
from mohd_train.utils.files import write_output
from mohd_train.utils.text import duration

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #ffffff; --faint: #666; --line: #d8d8d8; --card: #f6f6f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --page: #17181a; --faint: #a0a0a0; --line: #3a3c40; --card: #202226; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
figure { margin: 1.2rem 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.paper td { color: var(--faint); }
.note { color: var(--faint); font-size: .84rem; margin: .2rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.figures .wide { grid-column: 1 / -1; }
.figures img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .4rem .8rem; margin: .4rem 0; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def write_report(sweep: Path, output: Path | None = None) -> Path:
    """Writes the page (default: ``SWEEP_DIR/report.html``) and, beside it, the figures; returns its path.

    Raises:
        UserError: no sweep was launched there.
    """
    found = read_sweep_results(sweep)
    output = output or sweep / "report.html"
    paths, missing = figures.draw_all(sweep, output.parent / "figures")
    stored = [path for path in sorted((output.parent / "figures").glob("fig11_*.png")) if path not in paths]
    images = [path for path in paths if path.suffix == ".png"] + stored
    parts = [
        f"<h1>{html.escape(found.title)}</h1>",
        _lead(found),
        "<h2>Runs</h2>" + _runs(found).to_html(),
        "<h2>Results</h2>" + _tables(found),
        "<h2>Differences from the paper</h2>" + _differences(found),
        "<h2>Figures</h2>" + _images(images) + "".join(f"<p class=note>{html.escape(text)}.</p>" for text in missing),
        "<h2>Hardware, versions and cost</h2>" + _hardware(found),
        "<h2>Configs</h2>" + _configs(found),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(found.title)}</title>'
    body = "\n".join(parts)
    write_output(
        output,
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n',
    )
    return output


def _lead(found: SweepResults) -> str:
    states = Counter(run.status.state for run in found.runs)
    text = f"Sweep {found.name}, {found.scale} scale: " + ", ".join(f"{n} {state}" for state, n in states.items()) + "."
    if found.scale != "paper":
        text += (
            " Models an eighth as wide and a sixth as deep with the paper's proportions, on a very small part of its tokens:"
            " this shows that everything runs and the order of large effects, not the paper's numbers."
        )
    return f"<p>{html.escape(text)}</p>"


def _runs(found: SweepResults) -> Table:
    table = Table(
        "Every run", ["Run", "State", "Batch", "Tokens (M)", "Train loss", "Validation PPL", "Time", "Last error"]
    )
    for run in found.runs:
        status = run.status
        tokens = run.metrics[-1]["tokens"] / 1e6 if run.metrics else None
        table.add(
            run.name,
            status.state,
            f"{status.batch} of {status.batches}" if status.batches else str(status.batch),
            None if tokens is None else f"{tokens:.4g}",
            None if status.loss is None else f"{status.loss:.4f}",
            None if status.perplexity is None else f"{status.perplexity:.4g}",
            None if status.seconds is None else duration(status.seconds),
            status.error or "",
        )
    return table


def _tables(found: SweepResults) -> str:
    paper = load_numbers()
    settings = {run.setting for run in found.runs}
    chosen = [sweep_table(found), TABLES[1](paper, found), TABLES[3](paper, found)]
    chosen += [TABLES[4](paper, found)] if any(run.setting.startswith("x2-no-") for run in found.runs) else []
    chosen += [TABLES[5](paper, found)] if any(setting.startswith("attn") for setting in settings) else []
    if any(run.tasks for run in found.runs):
        chosen.insert(0, table2_of(found).to_table())
    return "".join(table.to_html() for table in chosen if table.rows)


def _differences(found: SweepResults) -> str:
    """What differs from the paper: the training settings, and each difference in the tables."""
    settings = load_numbers()["training"]
    configs = [run.record["config"] for run in found.runs if run.record]
    if not configs:
        return "<p>No run has started.</p>"
    config, world = configs[0], _processes(found)
    theirs = {
        "steps": (settings["steps"], config["max_duration"].removesuffix("ba")),
        "sequence length": (settings["sequence_length"], config["max_seq_len"]),
        "global batch (samples)": (settings["global_batch_size"], config["global_train_batch_size"]),
        "learning rate": (settings["learning_rate"], config["optimizer"]["lr"]),
        "router learning rate": (settings["router_learning_rate"], config["optimizer"]["router_lr"]),
        "data": (settings["data"], ", ".join(config["data"]["domains"])),
        "hardware": (settings["hardware"], world),
    }
    table = Table("How the models were trained", ["", "Ours", "Paper"])
    for name, (paper, ours) in theirs.items():
        table.add(name, str(ours), str(paper))
    return table.to_html() + _against_paper(found).to_html()


def _against_paper(found: SweepResults) -> Table:
    """Every number that both we and the paper have: perplexity changes of Tables 4 and 5."""
    table = Table("Changes in perplexity", ["", "Ours", "Paper", "Difference"])
    paper = load_numbers()
    for number in (4, 5):
        printed = TABLES[number](paper, found)
        ours, theirs, difference = (printed.headers.index(head) for head in ("Δ", "Δ, paper", "Difference of Δ"))
        for row in printed.rows:
            if row[difference] != MISSING:
                table.add(f"Table {number}: {row[0]}", row[ours], row[theirs], row[difference])
    if not table.rows:
        table.notes.append("No run yet for a number of Table 4 or 5; Table 2 shows its own differences.")
    return table


def _processes(found: SweepResults) -> str:
    """``8 x NVIDIA A100``; each kind that was used."""
    seen: Counter[str] = Counter()
    for run in found.runs:
        for session in (run.record or {}).get("sessions", []):
            seen[f"{session['hardware']['processes']} x {session['hardware']['device']}"] += 1
    return ", ".join(seen) or "–"


def _device_hours(run: RunResult) -> float | None:
    sessions = (run.record or {}).get("sessions", [])
    if run.status.seconds is None or not sessions:
        return None
    return run.status.seconds / 3600 * sessions[-1]["hardware"]["processes"]


def _hardware(found: SweepResults) -> str:
    table = Table("What each run took", ["Run", "Hardware", "Sessions", "Time", "Device hours", "Commit", "Torch"])
    total = 0.0
    for run in found.runs:
        if run.record is None or not run.record.get("sessions"):
            continue
        hours, last = _device_hours(run), run.record["sessions"][-1]["hardware"]
        total += hours or 0.0
        code = run.record.get("code") or {}
        commit = (code.get("commit") or "")[:10] + (" (changed)" if code.get("dirty") else "")
        hardware = f"{last['processes']} x {last['device']}"
        spent = (
            None if run.status.seconds is None else duration(run.status.seconds),
            None if hours is None else f"{hours:.3g}",
        )
        table.add(
            run.name,
            hardware,
            str(len(run.record["sessions"])),
            *spent,
            commit or None,
            run.record.get("versions", {}).get("torch"),
        )
    table.notes.append(f"{total:.3g} device hours in total, training and validation.")
    return table.to_html()


def _images(images: list[Path]) -> str:
    def one(path: Path) -> str:
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem.replace("_", " "))
        width, height = struct.unpack(">II", path.read_bytes()[16:24])  # of the PNG's header
        wide = " class=wide" if width > 2 * height else ""
        return f'<figure{wide}><figcaption>{name}</figcaption><img alt="{name}" src="data:image/png;base64,{data}"></figure>'

    return f"<div class=figures>{''.join(map(one, images))}</div>"


def _configs(found: SweepResults) -> str:
    """The first run's full config; how the others differ from it."""
    folder = SweepFolder(found.folder)
    first: dict[str, Any] | None = None
    parts = []
    for run in found.runs:
        try:
            config = folder.config(run.name)
        except UserError as error:
            parts.append(f"<p class=note>{html.escape(str(error))}</p>")
            continue
        if first is None:
            first = config
            text = json.dumps(config, indent=1)
        else:
            text = (
                "\n".join(config_differences(first, config)).replace(" there, ", f" in {found.runs[0].name}, ")
                or "the same"
            )
        parts.append(f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(text)}</pre></details>")
    return "".join(parts)
