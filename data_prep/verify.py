"""Checks a prepared folder: every shard against the sizes and hashes in the manifest. Exits with 1 if there is a problem.

python data_prep/verify.py DIR [--quick]
"""

from __future__ import annotations

import argparse

from mohd_train.data.manifest import describe, load_manifest
from mohd_train.data.verify import verify
from mohd_train.errors import run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="prepared data")
    parser.add_argument("--quick", action="store_true", help="compare sizes only, not hashes")
    args = parser.parse_args()
    problems = verify(args.folder, hashes=not args.quick)
    print("\n".join(problems) or describe(load_manifest(args.folder)))
    print(f"{len(problems)} problem(s)" if problems else f"sound: {args.folder}")
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
