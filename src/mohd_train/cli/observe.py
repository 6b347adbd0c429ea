"""``mohd observe``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mohd_train.analysis.options import ObserveOptions, parse
from mohd_train.cli import describe

if TYPE_CHECKING:
    from mohd_train.analysis.knockout import Score
    from mohd_train.analysis.subject import Subject


def observe(argv: Sequence[str], prog: str) -> None:
    """The paper's observation study (Section 3, Figs. 3-5) on any causal LM, and interventions on the sub-dimensions of ours.

        %(prog)s --model HF_FOLDER_OR_NAME --data TEXT_OR_PREPARED_FOLDER
        %(prog)s --model runs/355m-x2/checkpoints/latest-rank0.pt --data DATA --layer 12 --knockout
        %(prog)s --model CHECKPOINT --data DATA --knockout --knockout-layers 5 --tasks sciq --task-data DIR --limit 50

    Writes observation.json, router.json and knockout.json (MoHD checkpoints) and figures (PDF, PNG); see docs/observation.md.
    """
    options = parse(describe(observe, prog), argv, prog)
    from mohd_train.analysis.run import run_observation  # after parsing: --help and usage errors answer at once
    from mohd_train.evaluate.load import pick_device

    with tempfile.TemporaryDirectory(prefix="mohd_observe_") as cache:
        make_score = (lambda subject: _task_score(subject, options, cache)) if options.tasks else None
        run_observation(options, pick_device(options.device), make_score)


def _task_score(subject: Subject, options: ObserveOptions, cache: str) -> Score:
    """A function that scores the model in its current state on the requested tasks."""
    import logging
    from pathlib import Path

    import datasets

    from mohd_train.errors import UserError
    from mohd_train.evaluate.harness import HarnessLM, score
    from mohd_train.evaluate.load import LoadedModel
    from mohd_train.evaluate.tasks import build_task, stock_manager
    from mohd_train.results.store import scores_of
    from mohd_train.results.suite import load_suite

    if subject.tokenizer is None:
        raise UserError(f"--tasks: {options.model} has no tokenizer; give one with --tokenizer")
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    suite = load_suite()
    specs = suite.select(options.tasks)
    manager = stock_manager(specs)
    built = [build_task(spec, manager, options.task_data, Path(cache)) for spec in specs]
    info = {**subject.info, "tokenizer": str(options.tokenizer or options.model)}
    ours = subject.transformer is not None
    lm = HarnessLM(LoadedModel(subject.model, subject.tokenizer, info, vocab_size=subject.vocab_size, ours=ours))

    def scored() -> dict[str, float]:
        found = {}
        for task in built:
            raw = score(lm, task, limit=options.limit, seed=suite.seed)
            value = scores_of(raw, task.spec.name)[task.spec.metric]
            assert value is not None, f"lm-eval gave no {task.spec.metric} for {task.spec.name}"
            found[task.spec.name] = float(value)
        return found

    return scored
