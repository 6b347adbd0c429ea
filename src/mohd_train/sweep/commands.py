"""The commands of `mohd sweep`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from mohd_train.config.plan import SubDimPlan
from mohd_train.config.schema import Config
from mohd_train.data.manifest import MANIFEST
from mohd_train.errors import UserError
from mohd_train.sweep.data import DataSource, check_once, data_overrides, ensure_data
from mohd_train.sweep.expand import Choice, SweepRun, default_folder, expand, total_batches
from mohd_train.sweep.file import SweepFile, all_sweeps, read_sweep
from mohd_train.sweep.folder import RECORD, SweepFolder
from mohd_train.sweep.launch import kubernetes, slurm
from mohd_train.sweep.launch.jobs import ClusterOptions
from mohd_train.sweep.launch.local import LocalLauncher
from mohd_train.sweep.launch.worker import run_one
from mohd_train.sweep.scale import SCALES
from mohd_train.sweep.status import FAILED_STATES, RunStatus, job_states, render, run_status

LAUNCHERS = ("local", "slurm", "k8s")
WATCH = 5.0  # seconds between two updates


@dataclass(frozen=True)
class Request:
    """The arguments of a command line; see ``mohd sweep --help``."""

    target: Path | None = None  # a sweep file, or the folder of a launched sweep
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    scale: str | None = None
    out: Path | None = None
    launcher: str = "local"
    parallel: int | None = None
    processes: int | None = None
    data: str | None = None
    raw: str | None = None
    tokenizer: str | None = None
    template: Path | None = None
    submit_args: str = ""
    image: str | None = None
    namespace: str = "default"
    claim: str | None = None
    once: bool = False


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def _target(request: Request) -> Path:
    if request.target is None:
        raise UserError("which sweep? give a file such as configs/sweep/table4.yaml, or the folder of a launched one")
    return request.target


def _open(request: Request) -> tuple[SweepFile, SweepFolder, str]:
    """The sweep's file, its folder and scale; a folder as target determines all three."""
    target = _target(request)
    if (target / RECORD).exists():
        folder = SweepFolder(target)
        return read_sweep(folder.record["file"]), folder, folder.record["scale"]
    sweep, scale = read_sweep(target), request.scale or "paper"
    return sweep, SweepFolder(request.out or default_folder(sweep, scale)), scale


def _launched(request: Request) -> SweepFolder:
    """The folder of a launched sweep, found by its file where no folder is named. Raises UserError where there is none, or two."""
    target = _target(request)
    if (target / RECORD).exists():
        return SweepFolder(target)
    sweep = read_sweep(target)
    scales = (request.scale,) if request.scale else SCALES
    candidates = [request.out] if request.out else [default_folder(sweep, scale) for scale in scales]
    found = [path for path in candidates if (path / RECORD).exists()]
    if not found:
        raise UserError(
            f"{sweep.name} has not been launched in {' or '.join(map(str, candidates))}; launch it, or give --out"
        )
    if len(found) > 1:
        raise UserError(f"{sweep.name} has been launched in {' and '.join(map(str, found))}; give --scale or --out")
    return SweepFolder(found[0])


def _source(request: Request, folder: SweepFolder) -> DataSource:
    given = DataSource(request.data, request.raw, request.tokenizer)
    return given if given.given else folder.source


def _part(part: SubDimPlan | None) -> str:
    return f"{part.top_k}/{part.sub_dims}, {part.shared} shared" if part else "dense"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e7 else f"{count / 1e6:.3f}M"


def list_sweeps(request: Request) -> None:
    """The sweeps of ``configs/sweep``; or, with a file, its runs."""
    if request.target is None:
        table = Table(box=box.SIMPLE_HEAD)
        for head in ("file", "runs", "recipe", "what"):
            table.add_column(head)
        for sweep in all_sweeps():
            size = sum(len(block.seeds) * len(block.models) * len(block.settings) for block in sweep.blocks)
            table.add_row(f"configs/sweep/{sweep.path.name}", str(size), sweep.recipe.stem, sweep.title)
        _console().print(table)
        return
    from mohd_train.model.count import count  # needs torch

    sweep, folder, scale = _open(request)
    runs, of_data = _with_data(request, sweep, folder, scale)
    vocabulary = " and ".join(sorted({f"{run.plan.vocab_size:,}" for run in runs}))
    title = f"{sweep.title} · --scale {scale} · vocabulary {vocabulary}{' (of the data)' if of_data else ''}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("run", "what", "hidden", "attention", "ffn", "activated", "total", "batches"):
        table.add_column(head)
    for run in runs:
        counts, plan = count(run.plan), run.plan
        shape = (str(plan.hidden_size), _part(plan.attention), _part(plan.ffn or plan.experts))
        sizes = (_millions(counts.activated), _millions(counts.total))
        table.add_row(run.name, run.label, *shape, *sizes, str(total_batches(run.config) or "–"))
    _console().print(table)


def _with_data(request: Request, sweep: SweepFile, folder: SweepFolder, scale: str) -> tuple[list[SweepRun], bool]:
    """The runs on the data that was named now or at the launch, and whether that is prepared yet: if so, the vocabulary is
    the data's."""
    choice, source = _choice(request, scale), _source(request, folder)
    runs = expand(sweep, choice, folder.path)
    if not source.given:
        return runs, False
    place = source.place(folder.path)
    prepared = place.exists() if source.folder else (place / MANIFEST).exists()
    words = data_overrides(place, runs[0].config, scale) if prepared else (f"data.local={place}",)
    return expand(sweep, dataclasses.replace(choice, data=words), folder.path), prepared


def _choice(request: Request, scale: str, data: tuple[str, ...] = ()) -> Choice:
    return Choice(scale, request.seeds, request.only, request.overrides, data)


def show(request: Request) -> None:
    """Each run as the command that trains it by itself."""
    sweep, folder, scale = _open(request)
    processes = request.processes or SCALES[scale].processes
    runs, _ = _with_data(request, sweep, folder, scale)
    print(f"# {sweep.title} ({sweep.path}), in {folder.path}")
    for run in runs:
        print(f"\n# {run.name}: {run.label}")
        print(shlex.join(["composer", "-n", str(processes), "scripts/train.py", *run.files, *run.overrides]))


def launch(request: Request) -> int:
    """Prepares the data once, takes the folder, and starts every run that is neither finished nor under way.

    Returns 1 if a run failed, or couldn't be started because its ``run.json`` is broken."""
    sweep, folder, scale = _open(request)
    if folder.exists and request.target is not None and request.target.is_dir():
        request = dataclasses.replace(request, overrides=request.overrides or tuple(folder.record["overrides"]))
    return _launch(request, sweep, folder, _choice(request, scale))


def resume(request: Request) -> int:
    """Resumes a launched sweep: the same scale, data, seeds and overrides, without repeating them."""
    folder = _launched(request)
    if request.overrides:
        raise UserError("resume takes no key=value: the runs' configs are fixed; launch another sweep with --out")
    sweep = read_sweep(folder.record["file"])
    seeds = request.seeds or tuple(dict.fromkeys(run["seed"] for run in folder.runs.values()))
    choice = Choice(folder.record["scale"], seeds, request.only, tuple(folder.record["overrides"]))
    return _launch(request, sweep, folder, choice, known=set(folder.runs))


def _launch(
    request: Request, sweep: SweepFile, folder: SweepFolder, choice: Choice, known: set[str] | None = None
) -> int:
    source, scale = _source(request, folder), choice.scale
    processes = request.processes or SCALES[scale].processes
    folder.refuse_other(sweep, choice, source)
    first = expand(sweep, choice, folder.path)  # checks every config before spending minutes on the data
    place = ensure_data(source, folder.path, seq_len=_seq_len(first), scale=scale)
    choice = dataclasses.replace(choice, data=data_overrides(place, first[0].config, scale))
    runs = [run for run in expand(sweep, choice, folder.path) if known is None or run.name in known]
    for config in _distinct_data([run.config for run in runs]):
        check_once(config)
    with folder.locked():  # no other launch decides what to start, or rewrites the record, until ours is in it
        folder.claim(sweep, choice, source, runs)
        todo, states = _todo(folder, runs)
        for name, state in states.items():
            print(f"{name}: {state}", flush=True)
        unreadable = any(folder.record_problem(run.name) for run in runs)
        if request.launcher != "local":
            return _submit(request, folder, todo, processes) or int(unreadable)
    launcher = _local_launcher(request, folder, processes, runs[0].config.device == "cpu")
    if todo or launcher.orphans:
        return launcher.run(todo, list(folder.runs)) or int(unreadable)
    print(f"{folder.path}: nothing to start", flush=True)
    return int(unreadable)


def _seq_len(runs: list[SweepRun]) -> int:
    lengths = {run.config.max_seq_len for run in runs}
    if len(lengths) > 1:
        raise UserError(
            f"the runs take max_seq_len {', '.join(map(str, sorted(lengths)))}; one sweep has one length of samples"
        )
    return lengths.pop()


def _distinct_data(configs: list[Config]) -> list[Config]:
    """One config for each vocabulary: everything else that is checked is the same."""
    return list({config.model.vocab_size: config for config in configs}.values())


def _todo(folder: SweepFolder, runs: list[SweepRun]) -> tuple[list[str], dict[str, str]]:
    """Names to start; and why not the others: finished, under way, unreadable. Raises UserError if a scheduler can't be asked."""
    jobs, notes = job_states(folder)
    if notes:
        raise UserError(f"can't tell which runs are under way: {notes[0]}")
    states = {run.name: _why_not(folder, run.name, jobs.get(run.name)) for run in runs}
    return [name for name, why in states.items() if why is None], {name: why for name, why in states.items() if why}


def _why_not(folder: SweepFolder, name: str, job: str | None) -> str | None:
    if folder.finished(name):
        return "finished, left alone"
    if job or folder.run_lock(name).held():
        return f"under way already ({job or 'running'}), left alone"
    problem = folder.record_problem(name)
    return f"left alone: {problem}" if problem else None


def _local_launcher(request: Request, folder: SweepFolder, processes: int, on_cpu: bool) -> LocalLauncher:
    cluster_options = ("template", "submit_args", "image", "claim")
    given = [f"--{word.replace('_', '-')}" for word in cluster_options if getattr(request, word)]
    if given:
        raise UserError(f"{given[0]} is for --launcher slurm or k8s")
    share = SCALES[folder.record["scale"]].fits_data
    parallel = request.parallel or 1
    return LocalLauncher(folder, processes=processes, parallel=parallel, on_cpu=on_cpu, share_gpus=share)


def _submit(request: Request, folder: SweepFolder, names: list[str], processes: int) -> int:
    if not names:
        print(f"{folder.path}: nothing to start", flush=True)
        return 0
    options = ClusterOptions(
        processes=processes,
        parallel=request.parallel,
        template=request.template,
        arguments=tuple(shlex.split(request.submit_args)),
        image=request.image,
        namespace=request.namespace,
        claim=request.claim,
    )
    launcher = {"slurm": slurm, "k8s": kubernetes}[request.launcher]
    record = launcher.submit(folder, names, options)
    job = f"array job {record['job']}" if request.launcher == "slurm" else f"{len(names)} jobs"
    print(f"submitted {job}: {', '.join(names)}\nwatch: mohd sweep status {folder.path}", flush=True)
    return 0


def status(request: Request) -> int:
    """Shows the table; on a terminal until nothing is running, unless ``once``. Returns 1 if a run has failed."""
    folder, console = _launched(request), _console()

    def look() -> tuple[list[RunStatus], list[str]]:
        jobs, notes = job_states(folder)
        return [run_status(folder, name, jobs.get(name)) for name in _chosen(folder, request.only)], notes

    runs, notes = look()
    if console.is_terminal and not request.once and any(run.under_way for run in runs):
        with Live(render(folder.record["title"], runs), console=console, auto_refresh=False) as live:
            while any(run.under_way for run in runs):
                time.sleep(WATCH)
                folder = SweepFolder(folder.path)
                runs, notes = look()
                live.update(render(folder.record["title"], runs), refresh=True)
    else:
        console.print(render(folder.record["title"], runs))
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", markup=False)
    return 1 if any(run.state in FAILED_STATES for run in runs) else 0


def _chosen(folder: SweepFolder, only: tuple[str, ...]) -> list[str]:
    from fnmatch import fnmatch

    fields = ("name", "setting", "model")
    names = [
        name
        for name, run in folder.runs.items()
        if not only or any(fnmatch(run[key], pattern) for key in fields for pattern in only)
    ]
    if not names:
        raise UserError(f"--only {' '.join(only)}: {folder.path} has no such run; it has {', '.join(folder.runs)}")
    return names


def run(request: Request) -> int:
    """One run of a launched sweep: what a cluster's jobs call."""
    if len(request.only) != 1:
        raise UserError("run trains one run of a launched sweep: give its folder and --only NAME")
    return run_one(SweepFolder(_target(request)), request.only[0], request.processes or 1)


COMMANDS = {"list": list_sweeps, "show": show, "launch": launch, "status": status, "resume": resume, "run": run}
