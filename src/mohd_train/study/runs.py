"""The runs of a launched sweep as a study needs them: curves, losses of documents, and what they were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mohd_train.errors import UserError
from mohd_train.results.store import PERPLEXITY, read_perplexity
from mohd_train.results.sweep_results import RESULTS
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.run_folder.paths import METRICS
from mohd_train.sweep.file import Comparison, read_sweep
from mohd_train.sweep.folder import RECORD, SweepFolder
from mohd_train.sweep.status import run_status

LOSS = "metrics/eval/LanguageCrossEntropy"
# What must agree between two runs for them to have seen the same batches and to have been validated on the same tokens
PAIRED = (
    "data.domains", "data.shuffle", "data.shuffle_seed", "data.shuffle_block_size", "data.num_canonical_nodes", "max_seq_len",
    "global_train_batch_size", "eval_subset_num_batches", "model.vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """Each validation document: predicted tokens [D], summed loss [D] in nats, and the name of its domain [D]."""

    tokens: NDArray[np.float64]
    nll: NDArray[np.float64]
    domain: NDArray[np.str_]


@dataclass(frozen=True)
class Measured:
    """What ``mohd eval --perplexity`` stored of a checkpoint, on every validation sample."""

    loss: float  # nats a token
    domains: dict[str, float]  # nats a token
    settings: dict[str, Any]
    totals: dict[str, tuple[int, float]] | None  # by domain: predicted tokens, summed nats; None in a run from a record
    documents: Documents | None
    nats_per_byte: float | None = None  # of a run from a record


@dataclass(frozen=True)
class StudyRun:
    """One run; ``tokens`` and ``losses`` [P] are its validations within training (nats a token, every token alike)."""

    name: str
    model: str
    setting: str
    label: str
    seed: int
    state: str
    batch: int
    batches: int | None
    seconds: float | None
    config: dict[str, Any]
    record: dict[str, Any] | None
    tokens: NDArray[np.int64]
    losses: NDArray[np.float64]
    measured: Measured | None

    @property
    def finished(self) -> bool:
        """Whether it has trained to its end."""
        return self.state == "finished"

    @property
    def trained_on(self) -> dict[str, Any]:
        """What a run that it is paired with must share: data, order, batch size, length and validation."""
        data = ((self.record or {}).get("data") or {}).get("sha256")
        return {"data": data, "max_duration": self.config.get("max_duration")} | {
            key: _get(self.config, key) for key in PAIRED
        }


@dataclass
class Study:
    """A launched sweep; ``notes`` list what was set aside, and why."""

    folder: Path
    name: str
    title: str
    scale: str
    comparisons: tuple[Comparison, ...]
    runs: list[StudyRun]
    notes: list[str] = field(default_factory=list)

    def of(self, model: str, setting: str) -> dict[int, StudyRun]:
        """Seed -> run, of those that have been validated at least once."""
        return {run.seed: run for run in self.runs if (run.model, run.setting) == (model, setting) and len(run.tokens)}

    @property
    def models(self) -> list[str]:
        """Base models, in the sweep's order."""
        return list(dict.fromkeys(run.model for run in self.runs))


def _get(config: dict[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def read_study(folder: Path) -> Study:
    """Reads a launched sweep and the comparisons of its file.

    Raises:
        UserError: no sweep was launched there, or its file is gone or broken.
    """
    if not (folder / RECORD).is_file():
        raise UserError(
            f"{folder} is not the folder of a launched sweep (it has no {RECORD}); mohd sweep launch makes one"
        )
    there = SweepFolder(folder)
    sweep = read_sweep(there.record["file"])
    found = Study(folder, there.record["name"], there.record["title"], there.record["scale"], sweep.comparisons, [])
    for name, entry in there.runs.items():
        status = run_status(there, name)
        tokens, losses = _curve(folder / name / METRICS)
        fields = {key: entry[key] for key in ("name", "model", "setting", "label", "seed")}
        measured = read_measured(folder / RESULTS / name / PERPLEXITY, found.notes)
        found.runs.append(
            StudyRun(
                **fields,
                state=status.state,
                batch=status.batch,
                batches=status.batches,
                seconds=status.seconds,
                config=there.config(name),
                record=there.run_record(name),
                tokens=tokens,
                losses=losses,
                measured=measured,
            )
        )
    return found


def _curve(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    points = [(line["tokens"], line[LOSS]) for line in read_metrics(path) if LOSS in line]
    return np.array([t for t, _ in points], np.int64), np.array([loss for _, loss in points], np.float64)


def read_measured(path: Path, notes: list[str]) -> Measured | None:
    """A stored perplexity; None where there is none, or a broken one, which is named in the notes."""
    if not path.is_file():
        return None
    try:
        content = read_perplexity(path)
        totals = {name: (entry["tokens"], entry["nll"]) for name, entry in content["domains"].items()}
        loss = sum(nll for _, nll in totals.values()) / sum(tokens for tokens, _ in totals.values())
        domains = {name: nll / tokens for name, (tokens, nll) in totals.items()}
        return Measured(loss, domains, content["settings"], totals, _documents(content["domains"]))
    except (UserError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        notes.append(f"{path} is broken and set aside ({str(error).removeprefix(f'{path} ')})")
        return None


def _documents(domains: dict[str, Any]) -> Documents | None:
    """The documents of all domains, concatenated; None if the measurement kept none (results of earlier versions)."""
    if not all("documents" in entry for entry in domains.values()):
        return None
    tokens, nll, names = [], [], []
    for name, entry in domains.items():
        tokens += entry["documents"]["tokens"]
        nll += entry["documents"]["nll"]
        names += [name] * len(entry["documents"]["tokens"])
    return Documents(np.array(tokens, np.float64), np.array(nll, np.float64), np.array(names))


def differing(runs: Iterable[StudyRun]) -> list[str]:
    """``["data.shuffle_seed: 17 in a, 18 in b", ...]``: why runs of one seed can't be paired; empty where they can."""
    first, *others = runs
    ours = first.trained_on
    return [
        f"{key}: {ours[key]} in {first.name}, {value} in {other.name}"
        for other in others
        for key, value in other.trained_on.items()
        if value != ours[key]
    ]
