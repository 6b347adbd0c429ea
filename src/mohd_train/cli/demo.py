"""``mohd demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mohd_train.cli import make_parser


def demo(argv: Sequence[str], prog: str) -> None:
    """The whole path in one command, and the steps that only the demo has.

        %(prog)s run [--out runs/demo] [--raw DIR] [--tokenizer FILE] [--eval-data DIR] [--limit N] [--max-duration 100ba]
        %(prog)s corpus DIR                      text of this Python installation as RedPajama-style rows
        %(prog)s tokenizer RAW_DIR MODEL_FILE [--vocab-size 4096]    a small sentencepiece tokenizer learned from rows
        %(prog)s curves RUN_DIR... --output PNG  loss curves of runs

    `make demo` is `run`. A second one reuses what is complete and resumes what is not.
    """
    parser = make_parser(demo, prog)
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
    options = vars(parser.parse_args(argv))

    from mohd_train.demo import commands

    getattr(commands, options.pop("command"))(**options)
