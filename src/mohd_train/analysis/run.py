"""One observation from start to end: model, text, study, routing, interventions; then JSON, figures and tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mohd_train.analysis.corpus import Corpus, open_corpus
from mohd_train.analysis.figures import draw_observation
from mohd_train.analysis.knockout import Score, count_steps, knockout
from mohd_train.analysis.options import KnockoutOptions, ObserveOptions
from mohd_train.analysis.report import show_knockout, show_observation
from mohd_train.analysis.routing import routed, tally_routing
from mohd_train.analysis.routing_figures import draw_knockout, draw_router_selection
from mohd_train.analysis.study import Advance, observe
from mohd_train.analysis.subject import Subject, fingerprint, load_subject
from mohd_train.checkpoint.identity import is_sampled
from mohd_train.errors import UserError
from mohd_train.utils.environment import hardware, now, versions
from mohd_train.utils.files import write_atomic
from mohd_train.utils.progress import progress

FORMAT = "mohd_train.observation/2"  # 1: magnitudes were |x|
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")  # that compute the numbers
RECORD, ROUTER, KNOCKOUT = "observation.json", "router.json", "knockout.json"

MakeScore = Callable[[Subject], Score]


def run_observation(
    options: ObserveOptions,
    device: torch.device,
    make_score: MakeScore | None = None,
    console: Console | None = None,
) -> Path:
    """Measures, writes `observation.json`, `router.json`, `knockout.json` and figures, prints tables; returns the folder.

    Args:
        make_score: returns the function that scores tasks under an intervention, if tasks were asked for.
    Raises:
        UserError: bad input, found before anything is computed if possible.
    """
    console = console or Console()
    subject = load_subject(options.model, **{**options.loading(), "device": device})
    transformer = subject.transformer
    mohd = transformer is not None and bool(transformer.plan.components)
    if options.knockout is not None and not mohd:
        raise UserError(f"--knockout: {options.model} has no sub-dimensions; give a MoHD checkpoint")
    corpus = open_corpus(options.data, subject, options.seq_len)
    folder = _folder(options.output or Path("runs/observe") / subject.name)
    asked = {**asdict(options.knockout), "tasks": options.tasks, "limit": options.limit} if options.knockout else None
    if not options.overwrite:
        refuse_other(folder / RECORD, subject, corpus, asdict(options.study))
        if asked is not None:
            refuse_other(folder / KNOCKOUT, subject, corpus, asked)
    score = make_score(subject) if make_score is not None else None
    if options.knockout is not None and transformer is not None:
        count_steps(transformer, options.knockout, 1, scored=False)  # reports a wrong layer or intervention now

    with _bar(console, "activations", corpus.count_batches(options.study.tokens, options.study.batch_size)) as advance:
        record = observe(subject, corpus, options.study, advance)
    files = [_write(folder / RECORD, subject, corpus, {"options": asdict(options.study), **record})]
    files += draw_observation(record, subject.name, folder)
    if mohd:
        with _bar(console, "routing", corpus.count_batches(options.study.tokens, options.study.batch_size)) as advance:
            files += _router_view(subject, corpus, options, record["layer"], folder, advance)
    show_observation(console, record, subject.name)
    if options.knockout is not None:
        effects = _knockout(subject, corpus, options.knockout, score, console)
        files.append(_write(folder / KNOCKOUT, subject, corpus, {"options": asked, **effects}))
        files += draw_knockout(effects, subject.name, folder)
        show_knockout(console, effects, subject.name)
    for file in files:
        console.print(str(file), soft_wrap=True, highlight=False, markup=False)
    return folder


def _router_view(
    subject: Subject, corpus: Corpus, options: ObserveOptions, layer: int, folder: Path, advance: Advance
) -> list[Path]:
    assert subject.transformer is not None
    plan = subject.transformer.plan
    tally = tally_routing(subject, corpus, options.study.tokens, options.study.batch_size, advance)
    components = routed(plan)
    every = [tally.selection(each, kind) for each in range(plan.num_hidden_layers) for kind in components]
    path = _write(folder / ROUTER, subject, corpus, {"selections": [selection.to_dict() for selection in every]})
    return [path, *draw_router_selection([s for s in every if s.layer == layer], subject.name, folder)]


def _knockout(
    subject: Subject, corpus: Corpus, options: KnockoutOptions, score: Score | None, console: Console
) -> dict[str, Any]:
    assert subject.transformer is not None
    batches = corpus.count_batches(options.tokens, options.batch_size)
    steps = count_steps(subject.transformer, options, batches, scored=score is not None)
    with _bar(console, "interventions", steps) as advance:
        return knockout(subject, corpus, options, score, advance)


def _folder(folder: Path) -> Path:
    """Creates the output folder. Raises :class:`UserError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --output") from None
    return folder


def refuse_other(path: Path, subject: Subject, corpus: Corpus, options: dict[str, Any]) -> None:
    """Allows a stored record to be replaced only by the same measurement.

    Raises:
        UserError: ``path`` holds another model's record, one with other settings or data, or can't be read.
    """
    if not path.is_file():
        return
    remedy = "choose another --output, or add --overwrite"
    try:
        stored = json.loads(path.read_bytes())
        before_model, before = stored["model"], _settings(stored)
        stored_as = str(before_model.get("fingerprint"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not an observation of this program; {remedy}") from None
    # Earlier versions sampled the parameters of every model.
    fingerprints = {subject.info["fingerprint"]} | ({fingerprint(subject.model)} if is_sampled(stored_as) else set())
    if stored_as not in fingerprints:
        raise UserError(f"{path} holds the observation of another model ({before_model.get('source')}); {remedy}")
    current = _settings(json.loads(json.dumps(_about(subject, corpus) | {"options": options}, default=str)))
    differing = [
        f"{key}: {before.get(key)} there, {current.get(key)} now"
        for key in dict.fromkeys((*current, *before))
        if before.get(key) != current.get(key)
    ]
    if differing:
        raise UserError(f"{path} was made with other settings ({'; '.join(differing)}); {remedy}")


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What determines the numbers of a record besides the weights. Prepared data counts by its hash, not by its path."""
    options = {name: value for name, value in record["options"].items() if name != "batch_size"}
    data = {name: value for name, value in record["data"].items() if name != "path"}
    return {"format": record["format"], "dtype": record["model"]["dtype"], **data, **options}


def _about(subject: Subject, corpus: Corpus) -> dict[str, Any]:
    return {"format": FORMAT, "model": subject.info, "data": {**corpus.info, "seq_len": corpus.seq_len}}


def _write(path: Path, subject: Subject, corpus: Corpus, record: dict[str, Any]) -> Path:
    about = {
        **_about(subject, corpus),
        "versions": versions(PACKAGES),
        "device": str(subject.device),
        "hardware": hardware(subject.device.type),
        "date": now(),
    }
    write_atomic(path, json.dumps({**about, **record}, allow_nan=False) + "\n")
    return path


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows progress; yields the function that advances it by one."""
    done = itertools.count(1)
    with progress(console, name, total) as report:
        yield lambda: report(next(done), total)
