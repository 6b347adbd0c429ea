"""``mohd tables``, ``figures`` and ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mohd_train.cli import make_parser
from mohd_train.storage import path_or_uri


def tables(argv: Sequence[str], prog: str) -> None:
    """The paper's tables with our numbers, the paper's next to them, and the difference.

        %(prog)s SWEEP_DIR --table 4 [--format md|latex|csv|html] [--output FILE]
        %(prog)s eval/results                           # Table 2 from results of mohd eval
        %(prog)s eval/results --subjects                # MMLU subject by subject
        %(prog)s --paper-only --table 5                 # the paper's own

    SWEEP_DIR is the folder of a launched sweep. Our scores have standard errors: over seeds in a sweep that has several, else over
    questions. In Table 2 a row of ours is matched with the paper's by the model's name (355m-x2: MoHD-710M) and marked if its
    parameter counts differ. Missing numbers are shown as a dash, in CSV as an empty cell.
    """
    parser = make_parser(tables, prog)
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
    args = parser.parse_args(argv)
    if bool(args.results) == args.paper_only:
        parser.error("give RESULTS, or --paper-only without them")
    if args.subjects and (args.table != 2 or args.paper_only):
        parser.error("--subjects is of results (the paper gives none by subject), and goes with no other --table")

    from mohd_train.results.tables import subjects_text, table_text  # after parsing: --help answers at once
    from mohd_train.utils.files import write_output

    text = (
        subjects_text(args.results, args.format) if args.subjects else table_text(args.table, args.results, args.format)
    )
    if args.output is None:
        print(text, end="")
    else:
        write_output(args.output, text)
        print(f"table: {args.output}")


def figures(argv: Sequence[str], prog: str) -> None:
    """The paper's figures from a sweep: 8, 9a, 9b, 10, 12a, 12b, and load, balance loss and throughput over time; PDF and PNG.

        %(prog)s SWEEP_DIR [--output DIR]                 # default: SWEEP_DIR/figures
        %(prog)s SWEEP_DIR --router RUN --layer 5         # Fig. 11 too, on the validation data

    A figure for which the sweep has no runs is named with the reason.
    """
    parser = make_parser(figures, prog)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--output", type=Path, help="default: SWEEP_DIR/figures")
    parser.add_argument("--router", metavar="RUN", help="draw Fig. 11 for this run of the sweep")
    parser.add_argument("--layer", type=int, help="of Fig. 11, from 0; default: 5, or the last of a shallower model")
    parser.add_argument("--component", choices=["attention", "ffn"], help="of Fig. 11; default: both")
    args = parser.parse_args(argv)
    if args.router is None and (args.layer is not None or args.component):
        parser.error("--layer and --component need --router")

    from mohd_train.results import figures as drawing  # after parsing: --help answers at once

    output = args.output or args.sweep / "figures"
    paths, missing = drawing.draw_all(args.sweep, output)
    if args.router is not None:
        from mohd_train.analysis.routing_figures import draw_router  # loads a checkpoint: seconds

        paths += draw_router(args.sweep, args.router, output, args.layer, args.component)
    print("\n".join(str(path) for path in paths if path.suffix == ".png"))
    print("\n".join(missing))


def report(argv: Sequence[str], prog: str) -> None:
    """One self-contained HTML page about a sweep: runs, tables, figures, differences from the paper, hardware, cost, configs.

        %(prog)s SWEEP_DIR [--output FILE]                 # default: SWEEP_DIR/report.html

    Figures are written next to it. The page includes Fig. 11 once `mohd figures --router` has drawn it.
    """
    parser = make_parser(report, prog)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--output", type=Path, help="default: SWEEP_DIR/report.html")
    args = parser.parse_args(argv)

    from mohd_train.results.report import write_report  # after parsing: --help answers at once

    print(f"report: {write_report(args.sweep, args.output)}")
