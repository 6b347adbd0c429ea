"""``mohd eval`` and ``mohd prefetch``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from mohd_train.cli import describe, make_parser, positive, share
from mohd_train.evaluate.options import EvalOptions, SweepEvalOptions, parse
from mohd_train.storage import path_or_uri
from mohd_train.utils.arguments import add_load_options, given_load_options


def evaluate(argv: Sequence[str], prog: str) -> int:
    """Scores a checkpoint on the ten tasks of the paper's Table 2 through lm-eval, and stores one JSON file a task.

        %(prog)s --checkpoint runs/355m-x2/checkpoints/latest-rank0.pt
        %(prog)s --checkpoint HF_FOLDER --tasks sciq,arc_easy --data-dir DIR --limit 100 --output eval/results

        %(prog)s --checkpoint CHECKPOINT --perplexity --data PREPARED_FOLDER
        %(prog)s --sweep SWEEP_DIR [--perplexity] [--jobs N]      # every finished run, into SWEEP_DIR/eval

    Without --data-dir the questions come from the Hugging Face hub. Stored results are not computed again. --perplexity
    measures the validation perplexity of each domain instead of the tasks.
    """
    options = parse(describe(evaluate, prog), argv, prog)
    if isinstance(options, EvalOptions):  # imported after parsing: --help and usage errors answer at once
        from mohd_train.evaluate.run import run_eval

        return run_eval(options)
    if isinstance(options, SweepEvalOptions):
        from mohd_train.evaluate.sweep_eval import run_sweep

        return run_sweep(options)
    from mohd_train.evaluate.perplexity import run_perplexity

    return run_perplexity(options)


def generate(argv: Sequence[str], prog: str) -> None:
    """Continues a prompt, printing each token as it comes; tokens/s at the end.

        %(prog)s runs/355m-x2/checkpoints/latest-rank0.pt "The capital of France is"
        %(prog)s HF_FOLDER "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1

    A checkpoint of any kind: a file, a sharded folder, a Hugging Face folder, here or on object storage.
    """
    parser = make_parser(generate, prog)
    parser.add_argument("checkpoint", type=path_or_uri, help="a checkpoint in its run folder, or a Hugging Face folder")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=100, metavar="N")
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, help="0 (default): always the most likely token"
    )
    parser.add_argument(
        "--top-p", type=share, default=1.0, help="sample from the most likely tokens of this probability mass"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_load_options(parser)
    arguments = parser.parse_args(argv)

    from mohd_train.evaluate.generate import generate as run

    run(
        arguments.checkpoint,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        **given_load_options(arguments),
    )


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return value


def prefetch(argv: Sequence[str], prog: str) -> int:
    """Downloads the questions of the ten tasks from the Hugging Face hub into the layout that --data-dir reads, with hashes.

        %(prog)s DIR [--tasks sciq,mmlu ...]       # on a machine with a network; continues where it stopped
        %(prog)s DIR --verify                      # after copying: is every file intact?
        mohd eval --checkpoint CHECKPOINT --data-dir DIR

    DIR/manifest.json lists each file's rows, hash and source. An unavailable task is reported with the reason (exit code 1).
    """
    parser = make_parser(prefetch, prog)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", default=[], help="default: all ten (eval/tasks.yaml)")
    parser.add_argument("--verify", action="store_true", help="compare the files with the manifest; downloads nothing")
    args = parser.parse_args(argv)
    names = [name for item in args.tasks for name in re.split(r"[,\s]+", item) if name]

    from mohd_train.evaluate import prefetch as fetching
    from mohd_train.results.suite import load_suite

    if not args.verify:
        return fetching.prefetch(args.folder, load_suite(), names, lambda text: print(text, flush=True))
    problems, remarks = fetching.verify(args.folder, load_suite(), names)
    print("\n".join([*remarks, *problems, f"{len(problems)} problem(s)" if problems else "every file is intact"]))
    return 1 if problems else 0
