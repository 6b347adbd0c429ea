"""The paper's figures from a sweep: 8, 9a, 9b, 10, 12a, 12b, and load, balance loss and throughput over time; PDF and PNG.

    python eval/make_figures.py SWEEP_DIR [--output DIR]                 # default: SWEEP_DIR/figures
    python eval/make_figures.py SWEEP_DIR --router RUN --layer 5         # Fig. 11 too, on the validation data

A figure for which the sweep has no runs is named with the reason.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--output", type=Path, help="default: SWEEP_DIR/figures")
    parser.add_argument("--router", metavar="RUN", help="draw Fig. 11 for this run of the sweep")
    parser.add_argument("--layer", type=int, help="of Fig. 11, from 0; default: 5, or the last of a shallower model")
    parser.add_argument("--component", choices=["attention", "ffn"], help="of Fig. 11; default: both")
    args = parser.parse_args()
    if args.router is None and (args.layer is not None or args.component):
        parser.error("--layer and --component need --router")

    from mohd_train.evaluate import figure_router, figures  # after parsing: --help answers at once

    output = args.output or args.sweep / "figures"
    paths, missing = figures.draw_all(args.sweep, output)
    if args.router is not None:
        paths += figure_router.draw_router(args.sweep, args.router, output, args.layer, args.component)
    print("\n".join(str(path) for path in paths if path.suffix == ".png"))
    print("\n".join(missing))


if __name__ == "__main__":
    run_cli(main)
