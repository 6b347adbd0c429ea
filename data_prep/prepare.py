"""Raw JSON-lines rows -> a folder of packed, sharded training data.

    python data_prep/prepare.py --raw DIR --out DIR --tokenizer PATH_OR_NAME [--domains cc wiki ...] [--seq-len 4096]
                                [--val-tokens N] [--workers N] [--max-bad-rows SHARE_OR_COUNT]

It resumes if you run it again after a kill. docs/data.md describes the input layouts and the output.
"""

from __future__ import annotations

import argparse
import os

from mohd_train.data.manifest import describe
from mohd_train.data.prepare import Request, prepare
from mohd_train.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    raw = os.environ.get("RED_PAJAMA_DATA_DIR")
    parser.add_argument(
        "--raw", default=raw, required=raw is None, help="folder that holds the domains (default: $RED_PAJAMA_DATA_DIR)"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="folder to write: a new one, or one that an interrupted run with the same settings left",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="sentencepiece .model, tokenizer.json, or a Hugging Face folder or name"
    )
    parser.add_argument("--domains", nargs="+", help="only these domains (default: all)")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens per sample")
    parser.add_argument("--val-tokens", type=int, default=2_000_000, help="validation tokens in total; 0 for none")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    parser.add_argument(
        "--max-bad-rows", type=float, default=0.01, help="allowed bad rows: below 1 a share of all rows, else a count"
    )
    args = parser.parse_args()
    options = vars(args) | {"domains": tuple(args.domains) if args.domains else None}
    prepared = prepare(Request(**options))
    print(describe(prepared.manifest))
    print(f"{'already done' if prepared.already_done else 'done'}: {args.out}")


if __name__ == "__main__":
    run_cli(main)
