"""``mohd sweep``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mohd_train.cli import make_parser, positive
from mohd_train.storage import path_or_uri, refuse_remote
from mohd_train.sweep.commands import COMMANDS, LAUNCHERS, Request
from mohd_train.sweep.scale import PURPOSES, SCALES
from mohd_train.utils.arguments import add_cluster_options


def sweep(argv: Sequence[str], prog: str) -> int | None:
    """Sweeps: many runs from one short file, launched, watched and resumed together. docs/sweeps.md says more.

        %(prog)s list                                     # the sweeps of configs/sweep
        %(prog)s list|show configs/sweep/table4.yaml      # its runs; the command that trains each
        %(prog)s launch configs/sweep/table4.yaml --scale tiny --raw DIR --tokenizer MODEL [key=value ...]
        %(prog)s launch configs/sweep/table2.yaml --data DIR --launcher slurm --parallel 4
        %(prog)s status|resume configs/sweep/table4.yaml  # or the folder of a launched sweep

    A finished run is never trained again; a failed, stopped or killed one continues from its last checkpoint.
    """
    command, request = parse(argv, prog)
    return COMMANDS[command](request)


def parse(argv: Sequence[str], prog: str) -> tuple[str, Request]:
    """Parses the command line. A usage error exits through argparse, with 2."""
    parser = make_parser(sweep, prog)
    parser.add_argument("command", choices=COMMANDS, help="run: one run of a launched sweep (what cluster jobs call)")
    parser.add_argument(
        "target", nargs="?", type=Path, metavar="FILE", help="a sweep file, or a launched sweep's folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config of every run")
    parser.add_argument("--only", nargs="+", default=[], help="runs, settings or models; patterns such as '*x2*'")
    parser.add_argument("--seeds", nargs="+", type=_seed, help="in place of the file's")
    parser.add_argument("--scale", choices=SCALES, help=f"default: paper; {PURPOSES}")
    parser.add_argument("--out", type=path_or_uri, help="default: runs/sweep/NAME[-SCALE]")
    parser.add_argument("--data", help="prepared data, for all runs")
    parser.add_argument("--raw", help="or raw rows, prepared once into OUT/data,")
    parser.add_argument("--tokenizer", help="with this tokenizer")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="default: %(default)s")
    parser.add_argument("--parallel", type=positive, help="runs at once; default: 1 locally, as many as fit on SLURM")
    parser.add_argument(
        "--processes", type=positive, help="GPUs (or CPU processes) a run; default: 8, 1 below the paper's scale"
    )
    add_cluster_options(parser)
    parser.add_argument("--once", action="store_true", help="status: print the table once")
    options = vars(parser.parse_args(argv))
    refuse_remote(options["out"], "--out", "then copy it (aws s3 sync OUT s3://...)")
    overrides = list(options["overrides"])
    for name in ("only", "seeds"):  # these options take every argument that follows, key=value too
        given = options[name] or []
        overrides += [one for one in given if "=" in str(one)]
        options[name] = tuple(one for one in given if "=" not in str(one))
    options |= {"overrides": tuple(overrides), "seeds": options["seeds"] or None}
    return options.pop("command"), Request(**options)


def _seed(text: str) -> int | str:
    """A number; a key=value one that follows is passed on."""
    if "=" not in text and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return text if "=" in text else int(text)
