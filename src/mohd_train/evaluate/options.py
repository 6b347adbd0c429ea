"""The options of an evaluation and their command line. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mohd_train.resources import find
from mohd_train.storage import path_or_uri
from mohd_train.utils.arguments import LoadOptions, Parser, add_load_options


@dataclass
class EvalOptions(LoadOptions):
    """Options of `mohd eval` for the tasks."""

    checkpoint: Path | str
    output: Path | str
    tasks: list[str] = field(default_factory=list)  # empty: all ten
    data_dir: Path | None = None  # None: the hub
    limit: int | None = None  # questions a task (a subject); None: all
    batch_size: int | str = 8
    bos: str = "auto"  # auto | yes | no
    seed: int | None = None  # of the shots; default: the suite's
    name: str | None = None  # default: the model plan's
    overwrite: bool = False


@dataclass
class PerplexityOptions(LoadOptions):
    """Options of `mohd eval --perplexity`."""

    checkpoint: Path | str
    data: Path  # a prepared folder
    output: Path | str
    domains: list[str] = field(default_factory=list)  # empty: all
    limit: int | None = None  # batches a domain; None: all
    batch_size: int = 8
    name: str | None = None
    overwrite: bool = False


@dataclass
class SweepEvalOptions:
    """Options of `mohd eval --sweep`."""

    sweep: Path  # folder of a launched sweep
    jobs: int | None  # checkpoints at once; None: one a GPU
    arguments: list[str]  # of each checkpoint's own command


def parse(
    description: str | None, arguments: Sequence[str] | None = None, prog: str | None = None
) -> EvalOptions | PerplexityOptions | SweepEvalOptions:
    """Parses the command line of `mohd eval`. Usage errors exit with status 2, as argparse does."""
    sweep = Parser(prog=prog, add_help=False, allow_abbrev=False)
    sweep.add_argument("--sweep", type=Path)
    sweep.add_argument("--jobs", type=int)
    found, rest = sweep.parse_known_args(arguments)
    if found.sweep is None and found.jobs is None:
        return _parse_one(description, rest, prog)
    if found.sweep is None or (found.jobs is not None and found.jobs < 1):
        sweep.error(
            "--jobs goes with --sweep" if found.sweep is None else f"argument --jobs: {found.jobs} is not positive"
        )
    for option in ("--checkpoint", "--name", "--output", "--tokenizer"):
        if any(argument.partition("=")[0] == option for argument in rest):
            sweep.error(f"{option} does not go with --sweep, which sets it for each run")
    checked = ["--data", "given"] if "--perplexity" in rest and "--data" not in rest else []
    _parse_one(description, [*rest, *checked, "--checkpoint", "each"], prog)  # usage errors once, before any process
    return SweepEvalOptions(found.sweep, found.jobs, rest)


def _parse_one(description: str | None, arguments: Sequence[str], prog: str | None) -> EvalOptions | PerplexityOptions:
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        type=path_or_uri,
        required=True,
        help="Composer checkpoint (s3://... too) or Hugging Face folder",
    )
    parser.add_argument(
        "--sweep",
        metavar="DIR",
        help="instead of --checkpoint: every finished run of a launched sweep; stored results are reused",
    )
    parser.add_argument("--jobs", metavar="N", help="with --sweep: checkpoints at once; default: one a GPU")
    parser.add_argument("--tasks", nargs="+", default=[], help="default: all ten (eval/tasks.yaml)")
    parser.add_argument(
        "--data-dir", type=find, help="rows from DIR/<task>/<split>.jsonl (mmlu/<subject>/<split>.jsonl)"
    )
    parser.add_argument("--limit", type=int, help="questions a task, for trials; such results are marked")
    parser.add_argument(
        "--output", type=path_or_uri, default=Path("eval/results"), help="s3://... too; default: %(default)s"
    )
    parser.add_argument("--batch-size", default="8", help="requests a forward pass, or auto; default: %(default)s")
    parser.add_argument("--bos", default="auto", choices=["auto", "yes", "no"], help="begin each request with BOS")
    parser.add_argument("--seed", type=int, help="draws the shots; default: lm-eval's own")
    parser.add_argument("--name", help="of the model in tables; default: its plan's (355m-x2)")
    add_load_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace stored results of another checkpoint or setting"
    )
    parser.add_argument("--perplexity", action="store_true", help="validation perplexity per domain, on --data")
    parser.add_argument("--data", type=Path, help="a folder that mohd prepare made, for --perplexity")
    parser.add_argument("--domains", nargs="+", default=[], help="of --data; default: all")
    args = parser.parse_args(arguments)
    args.tasks = [name for item in args.tasks for name in re.split(r"[,\s]+", item) if name]
    if not re.fullmatch(r"auto|[1-9]\d*", args.batch_size):
        parser.error(f"argument --batch-size: {args.batch_size!r} is neither auto nor a positive number")
    _refuse_mixed(parser, args)
    if not args.perplexity:
        return EvalOptions(
            **{key: value for key, value in vars(args).items() if key in EvalOptions.__dataclass_fields__}
        )
    known = {key: value for key, value in vars(args).items() if key in PerplexityOptions.__dataclass_fields__}
    return PerplexityOptions(**{**known, "batch_size": int(args.batch_size)})


def _refuse_mixed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options of the tasks with --perplexity, and vice versa: they would have no effect."""
    if args.perplexity:
        for_tasks = [key for key in ("tasks", "data_dir", "seed") if getattr(args, key) not in (None, [])]
        for_tasks += ["bos"] if args.bos != "auto" else []
        if for_tasks:
            parser.error(f"--{for_tasks[0].replace('_', '-')} has no effect with --perplexity")
        if args.data is None or args.batch_size == "auto":
            parser.error("--perplexity needs --data, and a number for --batch-size")
    elif args.data or args.domains:
        parser.error("--data and --domains are for --perplexity; rows of the tasks are given with --data-dir")
