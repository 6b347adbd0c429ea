"""Runs that were trained somewhere else, from the record that ``mohd study record`` wrote of them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mohd_train.errors import UserError
from mohd_train.study.runs import Measured, Study, StudyRun

FORMAT = "mohd_train.study/1"


def read_recorded(file: Path) -> tuple[str, list[StudyRun]]:
    """The scale of a record, and its runs.

    Raises:
        UserError: no such file, or not the record of a study on one data set.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (found := content.get("format")) != FORMAT:
            raise UserError(f"{file} was not written by mohd study record: its format is {found!r}, not {FORMAT!r}")
        (data,) = content["data"]
        return content["scale"], [_run(entry, content["config"], data) for entry in content["runs"]]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the record of a study on one data set ({error!r})") from error


def add_recorded(study: Study, file: Path) -> None:
    """Adds the runs of a record that ``study`` lacks; the record of several machines or days is then one study.

    A record holds no losses of single documents, so a comparison with such runs has no interval over documents.

    Raises:
        UserError: as :func:`read_recorded`, or a record of another scale or of runs on other data: its seeds are no further
            seeds of this study.
    """
    scale, runs = read_recorded(file)
    if scale != study.scale:
        raise UserError(f"{file} has runs of --scale {scale}, {study.folder} of --scale {study.scale}")
    ours = {run.trained_on["data"] for run in study.runs} - {None}
    theirs = {run.trained_on["data"] for run in runs}
    if ours and ours != theirs:
        raise UserError(
            f"{file} has runs on other data than {study.folder} (sha256 {', '.join(theirs)}, not {', '.join(ours)})"
        )
    known = {run.name for run in study.runs if len(run.tokens)}
    added = {run.name: run for run in runs if run.name not in known}
    study.runs = [run for run in study.runs if run.name not in added] + list(added.values())
    if added:
        study.notes.append(f"from {file}: {', '.join(added)}")


def _run(entry: dict[str, Any], shared: dict[str, Any], data: str) -> StudyRun:
    config: dict[str, Any] = {"seed": entry["seed"]}
    for dotted, value in {**shared, **entry["config"]}.items():
        place = config
        *parents, last = dotted.split(".")
        for parent in parents:
            if place.get(parent) is None:  # a section that is null in the other runs
                place[parent] = {}
            place = place[parent]
        place[last] = value
    found = entry.get("measured")
    measured = None
    if found is not None:
        losses = {key: found[key] for key in ("loss", "nats_per_byte", "domains", "settings")}
        measured = Measured(**losses, totals=None, documents=None)
    return StudyRun(
        **{key: entry[key] for key in ("name", "model", "setting", "label", "seed", "state", "batch", "seconds")},
        batches=None,
        config=config,
        record={
            "data": {"sha256": data},
            "parameters": {key: entry[key] for key in ("activated", "total") if key in entry},
            "sessions": [{}] * entry["sessions"],
        },
        tokens=np.array(entry["curve"]["tokens"], np.int64),
        losses=np.array(entry["curve"]["loss"], np.float64),
        measured=measured,
    )
