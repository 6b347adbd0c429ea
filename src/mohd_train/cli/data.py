"""``mohd prepare`` and ``mohd verify``."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from mohd_train.cli import make_parser, positive
from mohd_train.utils.arguments import add_cluster_options


def prepare(argv: Sequence[str], prog: str) -> None:
    """Raw JSON-lines rows -> a folder of packed, sharded training data.

        %(prog)s --raw DIR --out DIR --tokenizer PATH_OR_NAME [--domains cc wiki ...] [--seq-len 4096]
            [--val-tokens N] [--workers N] [--max-bad-rows SHARE_OR_COUNT]

        %(prog)s ... --launcher slurm --tasks 64 [--submit-args "--partition=cpu"]    # the machines of a cluster share the work

    It resumes if you run it again after a kill. docs/data.md describes the input layouts and the output.
    """
    parser = make_parser(prepare, prog)
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
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="tokenize only one of N parts of the raw files")
    parser.add_argument(
        "--finish-after", type=positive, metavar="N", help="wait until N parts are tokenized, then finish"
    )
    parser.add_argument(
        "--launcher", choices=("slurm", "k8s"), help="let a cluster's machines do it, on the file system they share"
    )
    parser.add_argument(
        "--tasks", type=positive, metavar="N", help="with --launcher: parts, at most as many as raw files"
    )
    add_cluster_options(parser)
    args = parser.parse_args(argv)
    if bool(args.launcher) != bool(args.tasks):
        parser.error("--launcher and --tasks go together")
    if sum(map(bool, (args.launcher, args.shard, args.finish_after))) > 1:
        parser.error("--launcher, --shard and --finish-after exclude each other")

    from mohd_train.data import launch
    from mohd_train.data import prepare as preparing
    from mohd_train.data.manifest import describe
    from mohd_train.utils.jobs import ClusterOptions

    options = vars(args) | {"domains": tuple(args.domains) if args.domains else None}
    shard, finish_after, launcher, tasks = (options.pop(key) for key in ("shard", "finish_after", "launcher", "tasks"))
    cluster = ClusterOptions(
        arguments=tuple(shlex.split(options.pop("submit_args"))),
        **{key: options.pop(key) for key in ("template", "image", "namespace", "claim")},
    )
    if launcher:
        print(launch.launch(preparing.Request(**options), launcher, tasks, cluster))
        return
    if finish_after:
        preparing.wait_for_shards(preparing.Request(**options), finish_after)
    if shard is not None:
        files, size = preparing.prepare_shard(preparing.Request(**options), *shard)
        print(f"shard {shard[0]} of {shard[1]} is tokenized: {files} files, {size / 1e9:.2f} GB")
        return
    prepared = preparing.prepare(preparing.Request(**options))
    print(describe(prepared.manifest))
    print(f"{'already done' if prepared.already_done else 'done'}: {args.out}")


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/64")
    return int(number), int(count)


def verify(argv: Sequence[str], prog: str) -> int:
    """Checks a prepared folder: every shard against the sizes and hashes in the manifest. Exits with 1 if there is a problem.

    %(prog)s DIR [--quick]
    """
    parser = make_parser(verify, prog)
    parser.add_argument("folder", help="prepared data")
    parser.add_argument("--quick", action="store_true", help="compare sizes only, not hashes")
    args = parser.parse_args(argv)

    from mohd_train.data import verify as verifying
    from mohd_train.data.manifest import describe, load_manifest

    problems = verifying.verify(args.folder, hashes=not args.quick)
    print("\n".join(problems) or describe(load_manifest(args.folder)))
    print(f"{len(problems)} problem(s)" if problems else f"sound: {args.folder}")
    return 1 if problems else 0
