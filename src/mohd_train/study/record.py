"""The record of a study: every run in one JSON file, next to a Markdown page with tables and figures."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mohd_train.config.compare import FREE_KEYS
from mohd_train.errors import UserError
from mohd_train.study.compare import Compared, Curve, Difference, compare
from mohd_train.study.figures import draw_study
from mohd_train.study.recorded import FORMAT, read_recorded
from mohd_train.study.report import EXPLANATION, comparisons_markdown, markdown_table
from mohd_train.study.runs import Study, StudyRun
from mohd_train.study.statistics import Interval
from mohd_train.study.validation_bytes import bytes_per_token, nats_per_byte
from mohd_train.sweep.folder import SweepFolder
from mohd_train.utils.files import write_atomic
from mohd_train.utils.text import duration


def write_record(study: Study, folder: Path, name: str | None = None) -> list[Path]:
    """Writes ``folder/NAME.json``, ``NAME.md`` and the figures that the page shows, PNG. Returns the files.

    Args:
        name: of the files; default: the date of the newest run's end, the study's name and scale.

    Raises:
        UserError: no run has been validated yet; or the file is there with runs that this study lacks, which would be lost.
    """
    trained = [run for run in study.runs if len(run.tokens)]
    if not trained:
        raise UserError(f"{study.folder} has no run that has been validated yet: nothing to record")
    name = name or f"{_date(trained)}-{study.name}-{study.scale}"
    file, page = folder / f"{name}.json", folder / f"{name}.md"
    if file.exists():
        lost = {run.name for run in read_recorded(file)[1]} - {run.name for run in trained}
        if lost:
            raise UserError(
                f"{file} holds runs that {study.folder} lacks ({', '.join(sorted(lost))}); give another --name"
            )
    data = SweepFolder(study.folder).source.place(study.folder)
    measured = any(run.measured for run in trained)
    per_token = bytes_per_token(data) if measured and data.is_dir() else None
    content = _content(study, trained, per_token)
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for path in draw_study(study, folder / name):
        if path.suffix == ".png":
            figures.append(path)
        else:  # the page shows pictures; mohd study figures makes PDFs
            path.unlink()
    write_atomic(file, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(page, _page(study, content, name, figures).encode())
    return [file, page, *figures]


def _date(runs: list[StudyRun]) -> str:
    ends = [str(end) for run in runs if (end := (run.record or {}).get("ended"))]
    return max(ends)[:10] if ends else datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a config, without those that decide only where and how a run runs."""
    found: dict[str, Any] = {}
    for key, child in value.items():
        name = f"{prefix}{key}"
        if name in FREE_KEYS or name in ("run_name", "seed"):
            continue
        if isinstance(child, dict) and name not in ("data.domains", "mohd.attention", "mohd.ffn"):
            found |= flat(child, f"{name}.")
        else:
            found[name] = child
    return found


def _content(study: Study, runs: list[StudyRun], per_token: dict[str, float] | None) -> dict[str, Any]:
    configs = {run.name: flat(run.config) for run in runs}
    first = configs[runs[0].name]
    same = {key: value for key, value in first.items() if all(one.get(key) == value for one in configs.values())}
    return {
        "format": FORMAT,
        "study": study.name,
        "title": study.title,
        "scale": study.scale,
        "config": same,  # of every run; each run has the rest
        "bytes_per_token": per_token,
        "code": _every(runs, "code"),
        "versions": _every(runs, "versions"),
        "data": _every(runs, "data", "sha256"),
        "hardware": _distinct(one for run in runs for one in _hardware(run)),
        "runs": [_run(run, {k: v for k, v in configs[run.name].items() if k not in same}, per_token) for run in runs],
        "comparisons": [_compared(compare(study, one)) for one in study.comparisons],
        "notes": list(dict.fromkeys(study.notes)),
    }


def _every(runs: list[StudyRun], key: str, within: str | None = None) -> list[Any]:
    """The distinct values in the runs' records."""
    values = ((run.record or {}).get(key) for run in runs)
    return _distinct(value.get(within) if within and isinstance(value, dict) else value for value in values)


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found


def _hardware(run: StudyRun) -> list[Any]:
    return [session["hardware"] for session in (run.record or {}).get("sessions", []) if "hardware" in session]


def _run(run: StudyRun, config: dict[str, Any], per_token: dict[str, float] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {key: getattr(run, key) for key in ("name", "model", "setting", "label", "seed", "state")}
    entry |= {"batch": run.batch, "seconds": run.seconds and round(run.seconds, 1), "config": config}
    sizes = (run.record or {}).get("parameters") or {}
    entry |= {"sessions": len((run.record or {}).get("sessions", []))}
    entry |= {key: sizes[key] for key in ("activated", "total") if key in sizes}
    entry["curve"] = {"tokens": run.tokens.tolist(), "loss": _rounded(run.losses)}
    if (found := run.measured) is not None:
        per_byte = nats_per_byte(found.totals, per_token) if found.totals and per_token else found.nats_per_byte
        entry["measured"] = {
            "loss": found.loss,
            "nats_per_byte": per_byte,
            "domains": found.domains,
            "settings": found.settings,
        }
    return entry


def _compared(found: Compared) -> dict[str, Any]:
    grid = [
        {"model": model, "setting": setting, "variant": variant, "loss": _interval(loss)}
        for (model, setting, variant), loss in found.grid.items()
    ]
    return {
        "title": found.title,
        "source": found.source,
        "grid": grid,
        "differences": [_plain(d) for d in found.differences],
    }


def _plain(one: Difference) -> dict[str, Any]:
    return {
        "model": one.model, "setting": one.setting, "variant": one.variant, "baseline": one.baseline, "seeds": list(one.seeds),
        "under_way": list(one.under_way), "at_end": _interval(one.at_end), "over_documents": _interval(one.documents),
        "trend": _interval(one.trend), "direction": one.direction, "paper": one.paper, "verdict": one.verdict,
        "curve": _curve(one.curve),
    }  # fmt: skip


def _interval(one: Interval | None) -> dict[str, Any] | None:
    return None if one is None else {"mean": one.mean, "low": one.low, "high": one.high, "n": one.n}


def _curve(one: Curve | None) -> dict[str, Any] | None:
    if one is None:
        return None
    bands = {name: _rounded(getattr(one, name)) for name in ("mean", "low", "high")}
    return {"tokens": one.tokens.tolist(), **bands}


def _rounded(values: Any) -> list[float | None]:
    """To six digits; JSON has no NaN or infinity, which become null."""
    return [round(float(value), 6) if math.isfinite(value) else None for value in values]


def _page(study: Study, content: dict[str, Any], name: str, figures: list[Path]) -> str:
    runs = content["runs"]
    seconds = sum(run["seconds"] or 0 for run in runs)
    finished = sum(run["state"] == "finished" for run in runs)
    commits = ", ".join(dict.fromkeys(str(one.get("commit"))[:10] for one in content["code"])) or "–"
    facts = [
        f"{finished} of {len(study.runs)} runs finished, {sum(run['sessions'] > 1 for run in runs)} of them resumed at least once; "
        f"{duration(seconds)} of training",
        f"scale {study.scale}; commit {commits}; data {', '.join(one[:12] for one in content['data']) or '–'}",
    ]
    for hardware in content["hardware"]:
        facts.append(", ".join(f"{key} {value}" for key, value in hardware.items() if value is not None))
    rows = []
    for run in runs:
        measured = run.get("measured")
        final = measured["loss"] if measured else run["curve"]["loss"][-1]
        per_byte = measured["nats_per_byte"] if measured else None
        rows.append(
            (
                run["setting"],
                str(run["seed"]),
                run["state"] if run["state"] != "finished" else "–",
                f"{run['curve']['tokens'][-1] / 1e6:.2f}M",
                f"{final:.4f}",
                f"{math.exp(final):.2f}",
                f"{per_byte:.4f}" if per_byte else "–",
                duration(run["seconds"]) if run["seconds"] else "–",
            )
        )
    headers = ("setting", "seed", "state", "tokens", "nats a token", "perplexity", "nats a byte", "time")
    parts = [
        f"# {study.title}\n\nWritten by `mohd study record`; `{name}.json` holds every run, curve and interval.\n",
        "\n".join(f"- {fact}" for fact in facts) + "\n",
        f"{EXPLANATION}\n",
        comparisons_markdown(study),
        *(f"![{path.stem}]({name}/{path.name})\n" for path in figures),
        f"## Every run\n\n{markdown_table(headers, rows)}",
    ]
    if content["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in content["notes"]) + "\n")
    return "\n".join(parts)
