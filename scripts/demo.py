"""The whole path in one command, and the small steps that only the demo has.

Usage:
    python scripts/demo.py run [--out runs/demo] [--raw DIR] [--tokenizer FILE] [--eval-data DIR] [--limit N]
                               [--max-duration 100ba]
    python scripts/demo.py corpus DIR                      text of this Python installation as RedPajama-style rows
    python scripts/demo.py tokenizer RAW_DIR MODEL_FILE [--vocab-size 4096]
                                                           a small sentencepiece tokenizer learned from rows
    python scripts/demo.py curves RUN_DIR... --output PNG  loss curves of runs

`make demo` is `run`. A second one reuses what is whole and goes on with what is not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli


def main() -> None:
    """Parses, then runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    run = subparsers.add_parser("run")
    for name in ("out", "raw", "tokenizer", "eval-data", "max-duration"):
        run.add_argument(f"--{name}")
    run.add_argument("--limit", type=int)
    subparsers.add_parser("corpus").add_argument("folder", type=Path)
    tokenizer = subparsers.add_parser("tokenizer")
    tokenizer.add_argument("raw", type=Path)
    tokenizer.add_argument("model", type=Path)
    tokenizer.add_argument("--vocab-size", type=int, default=4096, help="pieces (default: %(default)s)")
    curves = subparsers.add_parser("curves")
    curves.add_argument("runs", type=Path, nargs="+")
    curves.add_argument("--output", type=Path, required=True)
    options = vars(parser.parse_args())
    from mohd_train.demo import commands

    getattr(commands, options.pop("command"))(**options)


if __name__ == "__main__":
    run_cli(main)
