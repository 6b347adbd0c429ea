"""Trains a model: YAML files, merged left to right, then key=value overrides.

Usage:
    composer [-n PROCESSES] scripts/train.py FILE... [key=value...] [--print-config] [--dry-run]
    python scripts/train.py FILE... [key=value...]            (one process)

Example:
    composer scripts/train.py configs/recipe/paper_50b.yaml configs/model/355m.yaml configs/mohd/x2.yaml data.local=/data/mds
"""

from __future__ import annotations

import argparse

from mohd_train.config.load import load_config, split_arguments, to_yaml
from mohd_train.errors import run_cli


def main() -> None:
    """Parses, then trains, prints the config or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="FILE | key=value")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="run every check, write nothing, and exit")
    options = parser.parse_args()
    config = load_config(*split_arguments(options.arguments))
    if options.print_config:
        print(to_yaml(config), end="")
        return
    from mohd_train.train.train import dry_run, train  # after the config: importing Composer takes seconds

    (dry_run if options.dry_run else train)(config)


if __name__ == "__main__":
    run_cli(main)
