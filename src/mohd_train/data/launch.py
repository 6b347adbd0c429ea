"""``mohd prepare --launcher slurm | k8s``: the tokenizing stage as jobs of a cluster whose machines share a file system."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from mohd_train.data.prepare import Preparation, Request
from mohd_train.data.raw import find_sources
from mohd_train.data.tokenizer import load_tokenizer
from mohd_train.errors import UserError
from mohd_train.utils.environment import verb_command
from mohd_train.utils.jobs import (
    TEMPLATES,
    ClusterOptions,
    Rendered,
    call,
    claim_of,
    fill,
    sbatch,
    shell_word,
    yaml_list,
    yaml_text,
)

WORKERS = 16  # of a task, and the cores it requests


def launch(request: Request, launcher: str, tasks: int, options: ClusterOptions) -> str:
    """Submits ``tasks`` tasks, each for a part of the raw files, and a job that finishes after them. Returns a description.

    The job's file and the logs are in ``OUT.jobs``. Submitting again does no harm: a running part refuses a second
    process, and a tokenized one is left alone.

    Raises:
        UserError: what :func:`mohd_train.data.prepare.prepare` refuses at its start; no sbatch or kubectl, or they refuse.
    """
    cluster = claim_of(options) if launcher == "k8s" else {}
    preparation = Preparation(request, find_sources(request.raw, request.domains), load_tokenizer(request.tokenizer))
    preparation.check_out()
    if preparation.finished() is not None:
        return f"already done: {request.out}"
    files = sum(map(len, preparation.sources.values()))
    if tasks > files:
        raise UserError(
            f"--tasks {tasks}: there are {files} raw files, and a file is not divided; give at most {files}"
        )
    jobs = Path(f"{preparation.out.resolve()}.jobs")
    jobs.mkdir(parents=True, exist_ok=True)
    workers = request.workers or WORKERS
    name = "mohd-prepare-" + (
        re.sub(r"[^a-z0-9]+", "-", preparation.out.resolve().name.lower())[:40].strip("-") or "data"
    )
    command = shlex.join(_command(dataclasses.replace(request, workers=workers)))
    values: dict[str, object] = {"name": name, "cwd": Path.cwd(), "cpus": workers, "tasks": tasks, "last": tasks - 1}
    if launcher == "slurm":
        logs = str(jobs).replace("%", "%%")  # SLURM fills in what follows a single %
        script = jobs / "prepare.sbatch"
        values |= {"log": f"{logs}/%A_%a.log", "command": Rendered(command)}
        script.write_text(fill(options.template or TEMPLATES / "prepare.sbatch", values, shell_word), encoding="utf-8")
        job = sbatch(*options.arguments, str(script))
        after = [f"--dependency=afterany:{job}", f"--job-name={name}-finish", f"--output={logs}/%j-finish.log"]
        wrapped = f"--wrap=cd {shlex.quote(str(Path.cwd()))} && exec {command}"
        last = sbatch(f"--cpus-per-task={workers}", *after, *options.arguments, wrapped)
        return f"submitted array job {job} of {tasks} tasks, and job {last}, which finishes; logs: {jobs}"
    script = jobs / "prepare.yaml"
    part = f'exec {command} --shard "$JOB_COMPLETION_INDEX/{tasks}"'
    line = f'if [ "$JOB_COMPLETION_INDEX" -lt {tasks} ]; then {part}; else exec {command} --finish-after {tasks}; fi'
    values |= cluster | {"command": yaml_list(["sh", "-c", line]), "pods": tasks + 1, "retries": 5 * (tasks + 1)}
    script.write_text(fill(options.template or TEMPLATES / "prepare-job.yaml", values, yaml_text), encoding="utf-8")
    call(["kubectl", "apply", "--namespace", options.namespace, *options.arguments, "-f", str(script)])
    return f"submitted job {name} of {tasks} tasks and one that finishes ({script}); watch: kubectl logs -f -l job-name={name}"


def _command(request: Request) -> list[str]:
    """The same preparation as a command line that works from any folder."""
    tokenizer = Path(request.tokenizer)
    args: list[object] = ["--raw", Path(request.raw).resolve(), "--out", Path(request.out).resolve(), "--tokenizer"]
    args += [tokenizer.resolve() if tokenizer.exists() else request.tokenizer]
    args += ["--seq-len", request.seq_len, "--val-tokens", request.val_tokens, "--workers", request.workers]
    args += ["--max-bad-rows", request.max_bad_rows, *(["--domains", *request.domains] if request.domains else [])]
    return verb_command("prepare", *args)
