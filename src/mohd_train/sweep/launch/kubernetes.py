"""Runs as Kubernetes jobs, one each; and one run over several nodes as an Indexed Job (scripts/launch/kubernetes_job.py)."""

from __future__ import annotations

import json
import re
from typing import Any

from mohd_train.errors import UserError
from mohd_train.sweep.folder import SweepFolder
from mohd_train.sweep.launch.jobs import ClusterOptions, common_values, run_command
from mohd_train.utils.jobs import TEMPLATES, call, claim_of, fill, yaml_list, yaml_text

TEMPLATE = TEMPLATES / "sweep-job.yaml"
ONE_RUN_TEMPLATE = TEMPLATES / "run-job.yaml"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")  # a label of DNS (RFC 1035), with room for the pods' indices


def submit(folder: SweepFolder, names: list[str], options: ClusterOptions) -> dict[str, Any]:
    """One job for each run. Returns the launch's record.

    Raises:
        UserError: no kubectl, no image or claim named, or a job is refused; jobs submitted before it are recorded.
    """
    if options.parallel is not None:
        raise UserError(
            "--parallel does not go with --launcher k8s: the cluster starts jobs as they fit; choose runs with --only"
        )
    cluster, number = claim_of(options), len(folder.record["launches"]) + 1
    sweep = re.sub(r"[^a-z0-9-]+", "-", folder.record["name"].lower())
    common = common_values(folder, options) | cluster | {"sweep": sweep}
    jobs = {name: job_name(name, number) for name in names}
    if len(set(jobs.values())) < len(jobs):
        raise UserError("two runs get the same Kubernetes name; give their settings shorter names")
    files = {}
    for name, job in jobs.items():
        files[name] = folder.path / "jobs" / f"{job}.yaml"
        command = yaml_list([*run_command(folder, options.processes), name])
        text = fill(options.template or TEMPLATE, common | {"name": job, "run": name, "command": command}, yaml_text)
        files[name].write_text(text, encoding="utf-8")
    launch = folder.add_launch("k8s", [], jobs={}, namespace=options.namespace, processes=options.processes)
    for name, file in files.items():
        launch["runs"].append(name)
        launch["jobs"][name] = jobs[name]
        folder.save()  # before the job exists: if this fails, no unrecorded job is running
        try:
            call(["kubectl", "apply", "--namespace", options.namespace, *options.arguments, "-f", str(file)])
        except UserError:
            launch["runs"].remove(name)
            del launch["jobs"][name]
            folder.save()
            raise
    return launch


def job_name(run: str, launch: int) -> str:
    """A name that Kubernetes takes (RFC 1123, at most 63 letters), another for each launch: a job that ended can't be run again."""
    return re.sub(r"[^a-z0-9]+", "-", f"mohd-{run}".lower())[:56].strip("-") + f"-l{launch}"


def states(launch: dict[str, Any]) -> dict[str, str]:
    """Run -> ``queued`` | ``running``, of the jobs that have not ended. Raises UserError if Kubernetes can't be asked."""
    if not launch["jobs"]:
        return {}
    names = list(launch["jobs"].values())
    command = ["kubectl", "get", "jobs", "--namespace", launch["namespace"], "--ignore-not-found", "-o", "json", *names]
    output = call(command)
    content = json.loads(output) if output else {"items": []}
    items = content.get("items", [content])  # kubectl returns a single job as is, several as a list
    alive = {
        item["metadata"]["name"]: "running" if item.get("status", {}).get("ready") else "queued"
        for item in items
        if not any(
            one["type"] in ("Complete", "Failed") and one["status"] == "True"
            for one in item.get("status", {}).get("conditions") or []
        )
    }
    return {run: alive[job] for run, job in launch["jobs"].items() if job in alive}


def kubernetes_job(
    args: list[str],
    *,
    name: str,
    image: str,
    claim: str,
    workdir: str,
    nodes: int = 1,
    gpus: int = 8,
    namespace: str = "default",
    retries: int = 10,
) -> str:
    """An Indexed Job with a pod on each node, and the service through which they find the first.

    Args:
        args: what scripts/train.py is given; autoresume=true is added (scripts/launch/node.sh).
        name: of the job, the service and, with an index, the pods.
        image: of the container; its PATH has Composer's launcher.
        claim: ``PVC:MOUNT_PATH`` of the file system that all nodes share.
        workdir: the checkout, where the container sees it.
        nodes, gpus: pods, and GPUs of each.
        namespace: Kubernetes's.
        retries: how many faults of a node are answered by restarting all of them.

    Raises:
        UserError: a name that Kubernetes does not take, a claim without its path, a number that can't be.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: Kubernetes takes lower-case letters, digits and '-', at most 52, a letter first"
        )
    volume, _, mount = claim.partition(":")
    if not volume or not mount:
        raise UserError(f"--claim {claim!r}: give PVC:MOUNT_PATH, the file system that holds checkout, data and runs")
    if min(nodes, gpus) < 1 or retries < 0:
        raise UserError(f"--nodes {nodes}, --gpus {gpus}, --retries {retries}: give at least 1, 1 and 0")
    values: dict[str, object] = {
        "name": name, "namespace": namespace, "image": image, "claim": volume, "mount": mount, "workdir": workdir,
        "nodes": nodes, "gpus": gpus, "world_size": nodes * gpus, "retries": retries * nodes,
        "command": yaml_list(["bash", "scripts/launch/node.sh", *args]),
    }  # fmt: skip
    return fill(ONE_RUN_TEMPLATE, values, yaml_text)
