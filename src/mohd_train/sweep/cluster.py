"""Launchers that hand runs to a scheduler: a SLURM array job, or Kubernetes jobs. Rendered to files, then submitted."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.sweep.file import CHECKOUT
from mohd_train.sweep.folder import SweepFolder

TEMPLATES = {"slurm": CHECKOUT / "scripts/launch/sweep.sbatch", "k8s": CHECKOUT / "scripts/launch/sweep-job.yaml"}
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT")


@dataclass(frozen=True)
class ClusterOptions:
    """What a user says of the cluster.

    Attributes:
        processes: GPUs, and processes, of each run: one node.
        parallel: runs at once (SLURM); None: as many as fit.
        template: of the job, in place of the project's.
        arguments: more words for sbatch or kubectl apply.
        image, namespace, claim: Kubernetes: the container image, the namespace, ``PVC:MOUNT_PATH`` of the shared file system.
    """

    processes: int
    parallel: int | None = None
    template: Path | None = None
    arguments: tuple[str, ...] = ()
    image: str | None = None
    namespace: str = "default"
    claim: str | None = None


def fill(template: Path, values: dict[str, object]) -> str:
    """A template's text with every ``{{name}}`` replaced. Raises UserError for a missing file or an unknown name."""
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{template}: can't read the job template ({error.strerror})") from None
    for name in re.findall(r"\{\{(\w+)\}\}", text):
        if name not in values:
            raise UserError(f"{template}: unknown placeholder {{{{{name}}}}}; known: {', '.join(values)}")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(values[match[1]]), text)


def _call(command: list[str]) -> str:
    """Output of a scheduler's program. Raises UserError where it is not there or refuses."""
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no {command[0]} here; launch from a machine of the cluster, or use --launcher local")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout.strip()


def _run_command(folder: SweepFolder, processes: int) -> list[str]:
    """What a job calls, but for the run's name, which comes last."""
    words = [sys.executable, str(CHECKOUT / "scripts/sweep.py"), "run", str(folder.path.resolve())]
    return [*words, "--processes", str(processes), "--only"]


def _common(folder: SweepFolder, options: ClusterOptions) -> dict[str, object]:
    return {
        "folder": folder.path.resolve(),
        "checkout": CHECKOUT,
        "cwd": Path.cwd(),
        "gpus": options.processes,
    }


def submit_slurm(folder: SweepFolder, names: list[str], options: ClusterOptions) -> dict[str, Any]:
    """One array job, a task for each run. Returns the launch's record.

    Raises:
        UserError: no sbatch, or it refuses.
    """
    number = len(folder.record["launches"]) + 1
    listing = folder.path / "jobs" / f"launch-{number}.runs"
    listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    at_once = f"%{options.parallel}" if options.parallel else ""
    values = _common(folder, options) | {
        "name": f"mohd-{folder.record['name']}",
        "array": f"0-{len(names) - 1}{at_once}",
        "runs": listing.resolve(),
        "command": shlex.join(_run_command(folder, options.processes)),
    }
    script = folder.path / "jobs" / f"launch-{number}.sbatch"
    script.write_text(fill(options.template or TEMPLATES["slurm"], values), encoding="utf-8")
    output = _call(["sbatch", "--parsable", *options.arguments, str(script)])
    job = output.splitlines()[-1].partition(";")[0]
    return folder.add_launch("slurm", names, job=job, script=str(script), processes=options.processes)


def job_name(run: str, launch: int) -> str:
    """A name that Kubernetes takes (RFC 1123, at most 63 letters), another for each launch: a job that ended can't be run again."""
    return re.sub(r"[^a-z0-9]+", "-", f"mohd-{run}".lower())[:56].strip("-") + f"-l{launch}"


def submit_kubernetes(folder: SweepFolder, names: list[str], options: ClusterOptions) -> dict[str, Any]:
    """One job for each run. Returns the launch's record.

    Raises:
        UserError: no kubectl, no image or claim named, or a job is refused; jobs submitted before it are recorded.
    """
    if options.parallel is not None:
        raise UserError(
            "--parallel does not go with --launcher k8s: the cluster starts jobs as they fit; choose runs with --only"
        )
    if not options.image or not options.claim or ":" not in options.claim:
        raise UserError(
            "--launcher k8s needs --image IMAGE and --claim PVC:MOUNT_PATH (the file system with checkout, data and runs)"
        )
    number = len(folder.record["launches"]) + 1
    claim, _, mount = options.claim.partition(":")
    common = _common(folder, options) | {
        "sweep": re.sub(r"[^a-z0-9-]+", "-", folder.record["name"].lower()),
        "image": options.image, "namespace": options.namespace, "claim": claim, "mount": mount,
    }  # fmt: skip
    jobs = {name: job_name(name, number) for name in names}
    if len(set(jobs.values())) < len(jobs):
        raise UserError("two runs get the same Kubernetes name; give their settings shorter names")
    files = {}
    for name, job in jobs.items():
        files[name] = folder.path / "jobs" / f"{job}.yaml"
        command = json.dumps([*_run_command(folder, options.processes), name])
        text = fill(options.template or TEMPLATES["k8s"], common | {"name": job, "run": name, "command": command})
        files[name].write_text(text, encoding="utf-8")
    launch = folder.add_launch("k8s", [], jobs={}, namespace=options.namespace, processes=options.processes)
    for name, file in files.items():
        _call(["kubectl", "apply", "--namespace", options.namespace, *options.arguments, "-f", str(file)])
        launch["runs"].append(name)
        launch["jobs"][name] = jobs[name]
        folder.save()
    return launch


def job_states(folder: SweepFolder) -> tuple[dict[str, str], list[str]]:
    """Run -> ``queued`` | ``running`` as the schedulers say, for each run's newest launch; and what could not be asked."""
    states: dict[str, str] = {}
    notes: list[str] = []
    launches = {id(launch): launch for name in folder.runs if (launch := folder.launch_of(name))}
    for launch in launches.values():
        ask = {"slurm": _slurm_states, "k8s": _kubernetes_states}.get(launch["launcher"])
        if ask is None:
            continue
        try:
            found = ask(launch)
        except UserError as error:
            notes.append(str(error))
            continue
        states |= {name: state for name, state in found.items() if folder.launch_of(name) is launch}
    return states, notes


def _slurm_states(launch: dict[str, Any]) -> dict[str, str]:
    try:
        output = _call(["squeue", "--noheader", "--array", f"--jobs={launch['job']}", "--format=%K %T"])
    except UserError as error:
        if "Invalid job id" in str(error):  # how squeue says that the job ended long ago
            return {}
        raise
    found = {}
    for line in output.splitlines():
        task, _, word = line.strip().partition(" ")
        state = "queued" if word in QUEUED else "running" if word in RUNNING else None
        if state and task.isdigit() and int(task) < len(launch["runs"]):
            found[launch["runs"][int(task)]] = state
    return found


def _kubernetes_states(launch: dict[str, Any]) -> dict[str, str]:
    if not launch["jobs"]:
        return {}
    names = list(launch["jobs"].values())
    command = ["kubectl", "get", "jobs", "--namespace", launch["namespace"], "--ignore-not-found", "-o", "json", *names]
    output = _call(command)
    content = json.loads(output) if output else {"items": []}
    items = content.get("items", [content])  # kubectl gives one job bare, several as a list
    alive = {
        item["metadata"]["name"]: "running" if item.get("status", {}).get("ready") else "queued"
        for item in items
        if not any(
            one["type"] in ("Complete", "Failed") and one["status"] == "True"
            for one in item.get("status", {}).get("conditions") or []
        )
    }
    return {run: alive[job] for run, job in launch["jobs"].items() if job in alive}
