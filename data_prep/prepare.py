"""Raw JSON-lines rows -> a folder of packed, sharded training data.

    python data_prep/prepare.py --raw DIR --out DIR --tokenizer PATH_OR_NAME [--domains cc wiki ...] [--seq-len 4096]
                                [--val-tokens N] [--workers N] [--max-bad-rows SHARE_OR_COUNT]

Run it again after a kill: it goes on where it was. docs/data.md describes layouts and what comes out.
"""

from __future__ import annotations

import argparse
import os

from mohd_train.data.prepare import Request, prepare
from mohd_train.data.report import describe
from mohd_train.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    raw = os.environ.get("RED_PAJAMA_DATA_DIR")
    parser.add_argument("--raw", default=raw, required=raw is None, help="folder of the domains (RED_PAJAMA_DATA_DIR)")
    parser.add_argument("--out", required=True, help="folder to write; new, or of the same preparation cut off")
    parser.add_argument(
        "--tokenizer", required=True, help="sentencepiece .model, tokenizer.json, or folder or hub name"
    )
    parser.add_argument("--domains", nargs="+", help="only these (default: all that are found)")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens in a sample")
    parser.add_argument("--val-tokens", type=int, default=2_000_000, help="validation tokens in total; 0: none")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--max-bad-rows", type=float, default=0.01, help="share of the rows below 1, else a count")
    args = parser.parse_args()
    options = vars(args) | {"domains": tuple(args.domains) if args.domains else None}
    prepared = prepare(Request(**options))
    print(describe(prepared.manifest))
    print(f"{'already done' if prepared.already_done else 'done'}: {args.out}")


if __name__ == "__main__":
    run_cli(main)
