"""Scores a checkpoint on the ten tasks of the paper's Table 2 through lm-eval, and stores one JSON file a task.

    python eval/run_eval.py --checkpoint runs/355m-x2/checkpoints/latest-rank0.pt
    python eval/run_eval.py --checkpoint HF_FOLDER --tasks sciq,arc_easy --data-dir DIR --limit 100 --output eval/results

Without --data-dir the rows come from the Hugging Face hub. What is stored already is not computed again.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mohd_train.errors import run_cli


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Composer checkpoint or Hugging Face folder")
    parser.add_argument("--tasks", nargs="+", default=[], help="default: all ten (eval/tasks.yaml)")
    parser.add_argument(
        "--data-dir", type=Path, help="rows from DIR/<task>/<split>.jsonl (mmlu/<subject>/<split>.jsonl)"
    )
    parser.add_argument("--limit", type=int, help="questions a task, for trials; such results are marked")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="default: %(default)s")
    parser.add_argument("--batch-size", default="8", help="requests a forward pass, or auto; default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N; default: %(default)s")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: as stored"
    )
    parser.add_argument("--bos", default="auto", choices=["auto", "yes", "no"], help="begin each request with BOS")
    parser.add_argument("--seed", type=int, help="draws the shots; default: lm-eval's own")
    parser.add_argument("--name", help="of the model in tables; default: its plan's (355m-x2)")
    parser.add_argument("--tokenizer", type=Path, help="default: beside the checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace stored results of another checkpoint or setting"
    )
    args = parser.parse_args()
    args.tasks = [name for item in args.tasks for name in re.split(r"[,\s]+", item) if name]
    if not re.fullmatch(r"auto|[1-9]\d*", args.batch_size):
        parser.error(f"argument --batch-size: {args.batch_size!r} is neither auto nor a positive number")
    return args


def main() -> int:
    args = _parse()
    from mohd_train.evaluate.run import EvalOptions, run_eval  # after parsing: --help and usage errors answer at once

    return run_eval(EvalOptions(**vars(args)))


if __name__ == "__main__":
    run_cli(main)
