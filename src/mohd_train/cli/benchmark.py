"""``mohd benchmark``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mohd_train.benchmark import MODES, PIPELINE
from mohd_train.cli import make_parser


def benchmark(argv: Sequence[str], prog: str) -> int:
    """Times MoHD against LLaMA of equal activated size, in turn in one process. Each backend is first checked for correctness.

    %(prog)s --models 355m:dense,355m:50,355m:x2 --mode layer --device cpu --threads 1 --tokens 2048
    %(prog)s --models 355m:x4 --mode decode --batch 1 --tokens 256 --json benchmarks/decode.json
    %(prog)s --models 355m:x4 --mode projections --layers 4
    %(prog)s --models 355m:x4 --sweep tokens=512,1024,2048 --profile
    %(prog)s --models 355m:hf-llama,355m:x2,355m:moe-x2,355m:hf-mixtral-x2   # beside transformers' models
    %(prog)s --mode loop --data DIR                            # a run beside a bare PyTorch loop
    %(prog)s --mode prepare --raw DIR --tokenizer MODEL        # mohd prepare beside datasets.map and datatrove
    %(prog)s --mode start --data DIR                           # from the command to the first batch
    %(prog)s --first-gpu benchmarks --minutes 25 [--data DIR]  # all that is worth doing first on a GPU, in that time
    %(prog)s --record benchmarks   # everything that benchmarks/ holds, measured on this machine
    """
    parser = make_parser(benchmark, prog)
    add_arguments(parser)
    arguments = parser.parse_args(argv)

    if arguments.first_gpu:
        from mohd_train.benchmark import first_gpu

        return first_gpu.run(arguments.first_gpu, arguments.minutes, arguments.device, arguments.data)
    if arguments.mode in PIPELINE:
        from mohd_train.benchmark import pipeline

        return pipeline.main(arguments)
    from mohd_train.benchmark import record, run  # after parsing: importing torch takes seconds

    if arguments.record:
        parts = record.pipeline_parts(arguments.data, arguments.raw, arguments.tokenizer)
        return record.record(arguments.record, arguments.device, peers=arguments.peers, pipeline=parts)
    return run.main(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command line."""
    parser.add_argument(
        "--models",
        default="355m:dense,355m:x2",
        help="model:setting,... by the files of configs/model and configs/mohd or configs/moe; model:hf-llama, "
        "model:hf-mixtral-x2 (transformers) and model:litgpt are others of the same sizes",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--mode", choices=(*MODES, *PIPELINE), default="layer")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step (decode: in the cache)")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence; default: min(tokens, 4096)")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--kernels", default="auto", help="auto, reference, grouped or triton")
    parser.add_argument("--layers", type=int, help="cut the models to this many layers of the same shapes")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="peak for MFU; default: the data sheet's, measured on a CPU")
    parser.add_argument(
        "--sweep",
        help="repeat for each value of tokens=512,1024, sub_dims=8,16, expansion=1,2,4, or of a number in kernels/: "
        "fusion.SUMMED=8,16",
    )
    parser.add_argument("--json", type=Path, help="write {environment, rows} to this file")
    parser.add_argument(
        "--record",
        type=Path,
        help="measure everything that benchmarks/ records of a machine, part by part, into this folder",
    )
    parser.add_argument(
        "--first-gpu",
        type=Path,
        metavar="DIR",
        help="kernels against the reference, layers, steps, a small run of each recipe, the study, decoding, in order of worth",
    )
    parser.add_argument("--minutes", type=float, default=25, help="--first-gpu: time for all; default: %(default)s")
    parser.add_argument(
        "--data", type=Path, help="prepared data, of --mode loop and start, and for the study of --first-gpu"
    )
    parser.add_argument("--raw", type=Path, help="--mode prepare: a folder of .jsonl rows")
    parser.add_argument("--tokenizer", type=Path, help="--mode prepare: as mohd prepare takes it")
    parser.add_argument("--workers", type=int, default=1, help="--mode prepare: processes; default: %(default)s")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="with --record: beside transformers' Llama and Mixtral, and litgpt's where it is installed",
    )
    parser.add_argument("--load", type=Path, help="measure nothing; show (and plot) the results in this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to this file (.svg or .png)")
    parser.add_argument("--profile", action="store_true", help="also profile a step of each model")
