"""Fetches the rows of the ten tasks from the Hugging Face hub into the layout that `--data-dir` reads, with their hashes.

    python eval/prefetch.py DIR [--tasks sciq,mmlu ...]       # on a machine with a network; goes on where it stopped
    python eval/prefetch.py DIR --verify                      # after copying: is every file whole?
    python eval/run_eval.py --checkpoint CHECKPOINT --data-dir DIR

DIR/manifest.json names each file's rows, hash and source. A task that cannot be had is named with its reason (exit code 1).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mohd_train.errors import run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", default=[], help="default: all ten (eval/tasks.yaml)")
    parser.add_argument("--verify", action="store_true", help="compare the files with the manifest; fetches nothing")
    args = parser.parse_args()
    names = [name for item in args.tasks for name in re.split(r"[,\s]+", item) if name]

    from mohd_train.evaluate.prefetch import prefetch, verify  # after parsing: --help answers at once
    from mohd_train.evaluate.suite import load_suite

    if not args.verify:
        return prefetch(args.folder, load_suite(), names, lambda text: print(text, flush=True))
    problems, remarks = verify(args.folder, load_suite(), names)
    print("\n".join([*remarks, *problems, f"{len(problems)} problem(s)" if problems else "every file is whole"]))
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
