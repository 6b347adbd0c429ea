"""Times MoHD against LLaMA of equal activated size, in turn in one process. Each backend is first checked for correctness.

python scripts/benchmark.py --models 355m:dense,355m:50,355m:x2 --mode layer --device cpu --threads 1 --tokens 2048
python scripts/benchmark.py --models 355m:x4 --mode decode --batch 1 --tokens 256 --json benchmarks/decode.json
python scripts/benchmark.py --models 355m:x4 --mode projections --layers 4
python scripts/benchmark.py --models 355m:x4 --sweep tokens=512,1024,2048 --profile
python scripts/benchmark.py --record benchmarks   # everything that benchmarks/ holds, measured on this machine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mohd_train.benchmark.record import record
from mohd_train.benchmark.run import add_arguments, main
from mohd_train.errors import run_cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.record:
        run_cli(lambda: record(Path(__file__), arguments.record, arguments.device))
    else:
        run_cli(lambda: main(CONFIGS, arguments))
