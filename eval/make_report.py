"""One self-contained HTML page about a sweep: runs, tables, figures, differences from the paper, hardware, cost, configs.

    python eval/make_report.py SWEEP_DIR [--output FILE]                 # default: SWEEP_DIR/report.html

Figures are written beside it; Fig. 11 is in the page if eval/make_figures.py --router has drawn it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--output", type=Path, help="default: SWEEP_DIR/report.html")
    args = parser.parse_args()

    from mohd_train.evaluate.report_html import write_report  # after parsing: --help answers at once

    print(f"report: {write_report(args.sweep, args.output)}")


if __name__ == "__main__":
    run_cli(main)
