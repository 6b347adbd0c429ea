"""Evaluates one checkpoint on the suite's tasks: stored results are reused, each task is stored when it is done."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import datasets
from lm_eval.utils import handle_non_serializable
from rich.console import Console

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.evaluate import terminal
from mohd_train.evaluate.harness import BOOTSTRAP_ITERS, HarnessLM, score
from mohd_train.evaluate.load import load
from mohd_train.evaluate.options import EvalOptions
from mohd_train.evaluate.rows import RowFile, why_missing
from mohd_train.evaluate.tasks import BuiltTask, build_task, stock_manager
from mohd_train.results import store
from mohd_train.results.output import Output
from mohd_train.results.suite import Suite, TaskSpec, load_suite
from mohd_train.utils.environment import hardware
from mohd_train.utils.progress import progress

DEMO_MARK = "DEMO"  # a file of this name in a folder of rows marks them as not the tasks' own


def run_eval(options: EvalOptions, suite: Suite | None = None, console: Console | None = None) -> int:
    """Evaluates a checkpoint, prints and stores the scores. Returns 0, or 1 if a task's questions were unavailable.

    Raises:
        UserError: bad input. Tasks that were done before the error stay stored.
    """
    suite, console = suite or load_suite(), console or Console()
    specs = suite.select(options.tasks)
    _check(options, suite)
    output = Output(options.output)
    found = checkpoint.open(options.checkpoint)
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for each truncated request; they are counted instead
    with tempfile.TemporaryDirectory(prefix="mohd_eval_") as cache:
        built, failed = _build(specs, options, Path(cache), console)
        loaded = load(found, name=options.name, **options.loading())
        lm = HarnessLM(loaded, options.batch_size, {"auto": None, "yes": True, "no": False}[options.bos])
        info = {**loaded.info, "max_length": lm.max_length, "bos": lm.bos, "dropped": lm.dropped}
        folder = output.folder / str(info["name"])
        output.fetch(folder.name)
        jobs = [(task, _settings(task, options, suite, info)) for task in built]
        for task in built:
            if said := store.set_aside(folder / f"{task.spec.name}.json"):
                console.print(said, markup=False, highlight=False, soft_wrap=True)
        kept = {
            task.spec.name: store.reusable(
                folder / f"{task.spec.name}.json", settings, found.fingerprint, options.overwrite
            )
            for task, settings in jobs
        }
        store.check_writable(folder)
        for name, reason in failed.items():
            if (path := store.write_missing(folder, name, info, reason)) is not None:
                output.send(path)
        done = _run(jobs, kept, lm, info, folder, options, console, output)
    console.print(f"{info['name']}: {info['checkpoint']}", soft_wrap=True, highlight=False)
    console.print(terminal.results_table(suite, done, failed))
    _notes(console, built, failed)
    console.print(f"results: {output.where}/{folder.name}", soft_wrap=True)
    return 1 if failed else 0


def _check(options: EvalOptions, suite: Suite) -> None:
    if version("lm_eval") != suite.lm_eval:
        raise UserError(
            f"lm-eval {version('lm_eval')} is installed, eval/tasks.yaml is written for {suite.lm_eval}; install that one"
        )
    if options.limit is not None and options.limit < 2:
        raise UserError(f"--limit is {options.limit}; it must be 2 or more (a standard error needs two questions)")
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError(
            f"no folder {options.data_dir}; --data-dir must hold <task>/<split>.jsonl (see docs/evaluation.md)"
        )


def _build(
    specs: list[TaskSpec], options: EvalOptions, cache: Path, console: Console
) -> tuple[list[BuiltTask], dict[str, str]]:
    """The tasks, and why others are unavailable from the hub, or were when mohd prefetch ran.

    A local file that is wrong, or missing for another reason, is an error instead.
    """
    manager, built, failed = stock_manager(specs), [], {}
    for spec in specs:
        why = why_missing(options.data_dir, spec.name) if options.data_dir is not None else None
        try:
            if why is None:
                built.append(build_task(spec, manager, options.data_dir, cache))
        except UserError as error:
            if options.data_dir is not None:
                raise
            why = str(error)
        if why is not None:
            failed[spec.name] = why
            console.print(f"skipped {spec.name}: {why}", markup=False, soft_wrap=True)
    if not built:
        raise UserError(f"none of the tasks is available; the first reason: {next(iter(failed.values()))}")
    return built, failed


def _settings(task: BuiltTask, options: EvalOptions, suite: Suite, info: dict[str, object]) -> store.Settings:
    return store.Settings(
        task=task.spec.name,
        shots=task.spec.shots,
        metric=task.spec.metric,
        seed=suite.seed if options.seed is None else options.seed,
        limit=options.limit,
        lm_eval=version("lm_eval"),
        bos=options.bos,
        dtype=str(info["dtype"]),
        rows=_rows_hash(task.files) if task.files else "hub",
        demo=options.data_dir is not None and (options.data_dir / DEMO_MARK).exists(),
        tokenizer=str(info["tokenizer_sha256"]),
        dropped=str(info["dropped"]),
    )


def _rows_hash(files: dict[str, RowFile]) -> str:
    digest = hashlib.sha256()
    for split, file in sorted(files.items()):
        digest.update(f"{split}:{file.sha256}\n".encode())
    return digest.hexdigest()[:16]


def _run(
    jobs: list[tuple[BuiltTask, store.Settings]],
    kept: dict[str, store.Result | None],
    lm: HarnessLM,
    info: dict[str, object],
    folder: Path,
    options: EvalOptions,
    console: Console,
    output: Output,
) -> dict[str, store.Result]:
    done: dict[str, store.Result] = {}
    for number, (task, settings) in enumerate(jobs, start=1):
        name, path = task.spec.name, folder / f"{task.spec.name}.json"
        place = f"[{number}/{len(jobs)}]"
        if (stored := kept[name]) is not None:
            done[name] = stored
            console.print(place, terminal.one_line(stored, None), markup=False, highlight=False, soft_wrap=True)
            continue
        start = time.monotonic()
        with progress(console, f"{place} {name} ({task.spec.shots}-shot)") as report:
            raw = score(lm, task, limit=settings.limit, seed=settings.seed, progress=report)
        seconds = time.monotonic() - start
        data = store.record(
            task.spec,
            settings,
            info,
            raw,
            truncated=asdict(lm.truncation),
            joined=asdict(lm.joined),
            files={
                split: {"path": str(file.path), "rows": file.rows, "sha256": file.sha256}
                for split, file in task.files.items()
            },
            absent_subjects=task.absent,
            bootstrap_iters=BOOTSTRAP_ITERS,
            batch_size=options.batch_size,
            device=str(lm.device),
            hardware=hardware(lm.device.type),
            seconds=round(seconds, 2),
        )
        store.write(path, data, default=handle_non_serializable)
        output.send(path)
        store.missing_path(folder, name).unlink(missing_ok=True)
        done[name] = store.read(path)
        console.print(place, terminal.one_line(done[name], seconds), markup=False, highlight=False, soft_wrap=True)
    return done


def _notes(console: Console, built: list[BuiltTask], failed: dict[str, str]) -> None:
    for task in built:
        if task.absent:
            console.print(
                f"{task.spec.name}: {len(task.leaves)} of {task.spec.subjects} subjects are in the local folder",
                highlight=False,
            )
    for name, reason in failed.items():
        console.print(f"{name}: – ({reason})", markup=False, highlight=False, soft_wrap=True)
