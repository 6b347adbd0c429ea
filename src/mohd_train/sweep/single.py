"""One run on Kubernetes, from the template of scripts/launch. A run on SLURM needs no rendering: scripts/launch/run.sbatch."""

from __future__ import annotations

import json
import re

from mohd_train.errors import UserError
from mohd_train.sweep.cluster import fill
from mohd_train.sweep.file import CHECKOUT

TEMPLATE = CHECKOUT / "scripts/launch/run-job.yaml"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")  # a label of DNS (RFC 1035), with room for the pods' indices


def kubernetes_job(
    words: list[str],
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
        words: what scripts/train.py is given; autoresume=true is added (scripts/launch/node.sh).
        name: of the job, the service and, with an index, the pods.
        image: of the container; its PATH has Composer's launcher.
        claim: ``PVC:MOUNT_PATH`` of the file system that all nodes share.
        workdir: the checkout, where the container sees it.
        nodes, gpus: pods, and GPUs of each.
        namespace: Kubernetes's.
        retries: faults of one node that are made up for by starting all of them again.

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
        "command": json.dumps(["bash", "scripts/launch/node.sh", *words]),
    }  # fmt: skip
    return fill(TEMPLATE, values)
