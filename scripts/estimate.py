"""Estimates what a run will take: memory of each GPU, time, disk, data. See docs/before_you_launch.md.

    python scripts/estimate.py configs/recipe/paper_50b.yaml configs/model/355m.yaml configs/mohd/x2.yaml --gpus 8 --gpu h100
    python scripts/estimate.py CONFIG... [key=value...] [--mfu 0.4] [--json]

Needs no GPU. Exits with 0 even if the run does not fit: see `fits` in --json.
"""

from __future__ import annotations

import argparse
import json

from mohd_train.config.load import load_config, split_arguments
from mohd_train.errors import run_cli


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number above 0, at most 1")
    return value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="FILE | key=value")
    parser.add_argument("--gpus", type=_positive, default=8, help="GPUs over all nodes (default 8)")
    parser.add_argument("--gpu", default="a100-80gb", help="a100-40gb, a100-80gb (default), h100, h200")
    parser.add_argument("--mfu", type=_share, help="model FLOPs utilization; default: by GPU and model")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    options = parser.parse_args()
    config = load_config(*split_arguments(options.config))
    from mohd_train.estimate.hardware import gpu_named  # after the config: importing torch takes seconds
    from mohd_train.estimate.launch import estimate
    from mohd_train.estimate.report import render

    found = estimate(config, gpu_named(options.gpu), options.gpus, options.mfu)
    print(json.dumps(found.to_dict(), indent=1) if options.json else render(found))


if __name__ == "__main__":
    run_cli(main)
