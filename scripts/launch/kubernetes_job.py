"""A run on one or more nodes as a Kubernetes Indexed Job, printed for kubectl. docs/multi_node.md says more.

    python scripts/launch/kubernetes_job.py --name mohd-x2 --nodes 2 --image IMAGE --claim PVC:MOUNT_PATH --workdir CHECKOUT \\
        configs/recipe/paper_50b.yaml configs/model/355m.yaml configs/mohd/x2.yaml | kubectl apply -f -

CHECKOUT, data and runs lie on the volume. The config is checked here first.
"""

from __future__ import annotations

import argparse

from mohd_train.config.load import load_config, split_arguments
from mohd_train.errors import run_cli
from mohd_train.sweep.launch.kubernetes import kubernetes_job


def main() -> None:
    """Parses, checks the config, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="FILE | key=value")
    for name, text in {
        "name": "of the job",
        "image": "of the container",
        "claim": "PVC:MOUNT_PATH",
        "workdir": "the checkout",
    }.items():
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node (default 8)")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--retries", type=int, default=10, help="faults of a node that are made up for (default 10)")
    options = vars(parser.parse_args())
    words = options.pop("config")
    load_config(*split_arguments(words))
    print(kubernetes_job(words, **options), end="")


if __name__ == "__main__":
    run_cli(main)
