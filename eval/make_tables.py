"""Table 2 from stored results: our scores, the paper's row beside each of ours, and the difference.

    python eval/make_tables.py eval/results
    python eval/make_tables.py runs/a/eval runs/b/eval --format latex --output table2.tex
    python eval/make_tables.py --paper-only

A row of ours is matched with the paper's by the model's name (355m-x2: MoHD-710M). Missing scores are shown as a dash.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help="result files, or folders of them")
    parser.add_argument("--format", choices=["md", "csv", "latex"], default="md", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a file; default: the terminal")
    parser.add_argument("--paper-only", action="store_true", help="the paper's own table")
    args = parser.parse_args()
    if bool(args.results) == args.paper_only:
        parser.error("give RESULTS, or --paper-only without them")

    from mohd_train.evaluate import (
        formats,
        paper,
        results,
        suite,
        tables,
        text_file,
    )  # after parsing: --help answers at once

    table = tables.build_table(
        suite.load_suite(), paper.load_paper(), results.find(args.results), paper_only=args.paper_only
    )
    text = formats.FORMATS[args.format](table)
    if args.output is None:
        print(text, end="")
    else:
        text_file.write_text(args.output, text)
        print(f"table: {args.output}")


if __name__ == "__main__":
    run_cli(main)
