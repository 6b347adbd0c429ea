"""What a sweep has shown: differences paired by seed with 95% intervals, curves over tokens, and a record. docs/study.md says more.

python scripts/study.py status runs/sweep/study-small              # how its runs stand, and every comparison so far
python scripts/study.py figures runs/sweep/study-small --output DIR
python scripts/study.py record runs/sweep/study-small              # benchmarks/DATE-study-small.{json,md} and figures
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli
from mohd_train.study import commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subparsers.add_parser("status").add_argument("folder", type=Path)
    figures = subparsers.add_parser("figures")
    figures.add_argument("folder", type=Path)
    figures.add_argument("--output", type=Path, help="default: FOLDER/figures")
    record = subparsers.add_parser("record")
    record.add_argument("folder", type=Path)
    record.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder; default: %(default)s")
    record.add_argument("--name", help="of the files; default: DATE-NAME-SCALE")
    options = vars(parser.parse_args())
    getattr(commands, options.pop("command"))(**options)


if __name__ == "__main__":
    run_cli(main)
