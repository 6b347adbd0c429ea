"""``mohd study``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mohd_train.cli import make_parser


def study(argv: Sequence[str], prog: str) -> None:
    """What a sweep has shown: differences paired by seed with 95% intervals, curves over tokens, and a record. See docs/study.md.

    %(prog)s status runs/sweep/study-small              # the state of its runs, and every comparison so far
    %(prog)s figures runs/sweep/study-small --output DIR
    %(prog)s record runs/sweep/study-small              # benchmarks/DATE-study-small.{json,md} and figures
    %(prog)s status runs/sweep/study-small --records benchmarks/DATE-study-small.json    # with runs of another machine
    """
    parser = make_parser(study, prog)
    subparsers = parser.add_subparsers(dest="command", required=True)
    status, figures, record = (subparsers.add_parser(name) for name in ("status", "figures", "record"))
    for command in (status, figures, record):
        command.add_argument("folder", type=Path)
        command.add_argument(
            "--records", type=Path, nargs="+", default=[], metavar="FILE.json",
            help="records of the same study on other machines: their runs count as this folder's",
        )  # fmt: skip
    figures.add_argument("--output", type=Path, help="default: FOLDER/figures")
    record.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder; default: %(default)s")
    record.add_argument("--name", help="of the files; default: DATE-NAME-SCALE")
    options = vars(parser.parse_args(argv))

    from mohd_train.study import commands  # after parsing: --help answers at once

    getattr(commands, options.pop("command"))(**options)
