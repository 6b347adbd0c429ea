"""The paper's tables with our numbers, the paper's beside them, and the difference.

    python eval/make_tables.py SWEEP_DIR --table 4 [--format md|latex|csv|html] [--output FILE]
    python eval/make_tables.py eval/results                           # Table 2 from results of eval/run_eval.py
    python eval/make_tables.py eval/results --subjects                # MMLU subject by subject
    python eval/make_tables.py --paper-only --table 5                 # the paper's own

SWEEP_DIR is what scripts/sweep.py launch filled. Scores of ours stand with their standard error: over seeds in a sweep that has
several, else over questions. In Table 2 a row of ours is matched with the paper's by the model's name (355m-x2: MoHD-710M) and
marked if its parameter counts are others. Missing numbers are shown as a dash, in CSV as nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli
from mohd_train.storage import path_or_uri


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results",
        nargs="*",
        type=path_or_uri,
        metavar="RESULTS",
        help="SWEEP_DIR; or result files and folders (s3://... too)",
    )
    parser.add_argument("--table", type=int, choices=[1, 2, 3, 4, 5], default=2, help="default: %(default)s")
    parser.add_argument("--format", choices=["md", "csv", "latex", "html"], default="md", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a file; default: the terminal")
    parser.add_argument("--paper-only", action="store_true", help="the paper's own table")
    parser.add_argument("--subjects", action="store_true", help="MMLU by subject in place of Table 2")
    args = parser.parse_args()
    if args.subjects and (args.table != 2 or args.paper_only):
        parser.error("--subjects is of results (the paper gives none by subject), and goes with no other --table")
    if bool(args.results) == args.paper_only:
        parser.error("give RESULTS, or --paper-only without them")

    from mohd_train.evaluate import table_text, text_file  # after parsing: --help answers at once

    if args.subjects:
        text = table_text.subjects_text(args.results, args.format)
    else:
        text = table_text.table_text(args.table, args.results, args.format)
    if args.output is None:
        print(text, end="")
    else:
        text_file.write_text(args.output, text)
        print(f"table: {args.output}")


if __name__ == "__main__":
    run_cli(main)
