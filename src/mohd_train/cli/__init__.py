"""The command ``mohd``. Each verb is one function, which the script of the same purpose calls too: ``mohd count`` is
``python scripts/count.py``.

A verb's module is imported when the verb is called, and what takes long to import (torch, Composer) inside the function, after
its arguments have been parsed: help and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mohd_train import __version__
from mohd_train.errors import run_cli
from mohd_train.utils.arguments import Parser
from mohd_train.utils.text import nearest


class Verb(NamedTuple):
    """Where a verb's function is, the script that calls it in a checkout, and what it does."""

    function: str  # "MODULE:NAME" below mohd_train.cli
    script: str
    summary: str


VERBS = {
    "prepare": Verb("data:prepare", "data_prep/prepare.py", "raw rows -> shards to train on"),
    "verify": Verb("data:verify", "data_prep/verify.py", "check prepared data against its hashes"),
    "count": Verb("model:count", "scripts/count.py", "parameters and FLOPs of a model"),
    "estimate": Verb("model:estimate", "scripts/estimate.py", "memory, time and disk of a run before it starts"),
    "train": Verb("model:train", "scripts/train.py", "train a model"),
    "export": Verb("model:export", "scripts/export_hf.py", "a checkpoint as a Hugging Face folder"),
    "import": Verb(
        "model:import_", "scripts/import_hf.py", "a pretrained LLaMA as a checkpoint to train on, dense or MoHD"
    ),
    "generate": Verb("evaluate:generate", "scripts/generate.py", "text from a checkpoint"),
    "sweep": Verb("sweep:sweep", "scripts/sweep.py", "many runs from one file: launch, watch, resume"),
    "eval": Verb("evaluate:evaluate", "eval/run_eval.py", "score checkpoints on the ten tasks, or by perplexity"),
    "prefetch": Verb("evaluate:prefetch", "eval/prefetch.py", "fetch the questions of the tasks"),
    "tables": Verb("results:tables", "eval/make_tables.py", "the paper's tables with our numbers beside"),
    "figures": Verb("results:figures", "eval/make_figures.py", "the paper's figures from a sweep"),
    "report": Verb("results:report", "eval/make_report.py", "a page about a sweep"),
    "study": Verb("study:study", "scripts/study.py", "compare the runs of a sweep, paired by seed"),
    "observe": Verb("observe:observe", "eval/observe.py", "activation study, interventions on sub-dimensions"),
    "benchmark": Verb("benchmark:benchmark", "scripts/benchmark.py", "time MoHD against LLaMA"),
    "demo": Verb("demo:demo", "scripts/demo.py", "the whole path on small data"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Calls the verb that ``argv`` (default: the process's arguments) begins with. Returns its exit status; 2 for a usage error."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    if args[:1] == ["--version"]:
        print(f"mohd_train {__version__}")
        return 0
    if not args or args[0] not in VERBS:
        hint = f"there is no verb {args[0]!r}{nearest(args[0], VERBS)}" if args else "which verb?"
        print(f"{_help()}\n\nerror: {hint}", file=sys.stderr)
        return 2
    return call(args[0], args[1:], f"mohd {args[0]}")


def call(verb: str, argv: Sequence[str], prog: str) -> int | None:
    """The verb's function with its arguments; ``prog`` is what its help calls it. Usage errors leave through argparse, with 2."""
    module, _, name = VERBS[verb].function.partition(":")
    function: Callable[[Sequence[str], str], int | None] = getattr(
        importlib.import_module(f"mohd_train.cli.{module}"), name
    )
    return function(argv, prog)


def make_parser(function: Callable[..., object], prog: str) -> argparse.ArgumentParser:
    """A parser whose help is ``function``'s docstring (see :func:`describe`)."""
    return Parser(prog=prog, description=describe(function, prog))


def describe(function: Callable[..., object], prog: str) -> str:
    """``function``'s docstring with ``%(prog)s`` in its examples filled in."""
    return (inspect.getdoc(function) or "").replace("%(prog)s", prog)


def positive(text: str) -> int:
    """An argument's type: a whole number, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def share(text: str) -> float:
    """An argument above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number above 0, at most 1")
    return value


def console() -> None:
    """The console command: :func:`main`, and the end of the process."""
    run_cli(main)


def script(verb: str) -> None:
    """What a script of the checkout is: its verb, with the process's arguments, and the end of the process."""
    run_cli(lambda: call(verb, sys.argv[1:], f"python {sys.argv[0]}"))


def _help() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: mohd VERB ... (mohd VERB --help says more)\n\n"
        f"Pretraining MoHD (Mixture of Hidden Dimensions) transformers on MosaicML Composer.\n\n{verbs}\n\n"
        "On several GPUs: composer -n 8 -c mohd train configs/recipe/paper_50b.yaml configs/model/355m.yaml configs/mohd/x2.yaml"
    )
