"""Parameters and FLOPs of a model by part, as the paper counts them.

python scripts/count.py configs/model/355m.yaml configs/mohd/x2.yaml [key=value...]
python scripts/count.py --all            # every row of Tables 1, 2 and 5, the paper's figure beside it
python scripts/count.py --all --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from mohd_train.config.catalogue import paper_models
from mohd_train.config.load import load_model_plan, split_arguments
from mohd_train.errors import run_cli
from mohd_train.model.count import count
from mohd_train.model.count_table import render_counts

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Parses, counts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="YAML files and key=value overrides")
    parser.add_argument("--all", action="store_true", help="every model of the paper's Tables 1, 2 and 5")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    arguments = parser.parse_args()
    if bool(arguments.config) == arguments.all:
        parser.error("give config files, or --all")
    rows = paper_models(ROOT) if arguments.all else [(load_model_plan(*split_arguments(arguments.config)), None)]
    counted = [(plan, count(plan), paper) for plan, paper in rows]
    if arguments.json:
        print(
            json.dumps(
                [{"name": plan.name, **counts.to_dict(), "paper": paper} for plan, counts, paper in counted], indent=1
            )
        )
    else:
        console = Console()
        console.width = max(console.width, 160)  # rather than cut numbers off in a narrow window or a pipe
        console.print(render_counts(counted))
    return 0


if __name__ == "__main__":
    run_cli(main)
