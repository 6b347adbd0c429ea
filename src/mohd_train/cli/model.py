"""``mohd count``, ``estimate``, ``train`` and ``export``: a model before, in and after a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mohd_train.cli import make_parser, positive, share
from mohd_train.storage import path_or_uri


def count(argv: Sequence[str], prog: str) -> None:
    """Parameters and FLOPs of a model by part, as the paper counts them.

    %(prog)s configs/model/355m.yaml configs/mohd/x2.yaml [key=value...]
    %(prog)s --all            # every row of Tables 1, 2 and 5, the paper's figure beside it
    %(prog)s --all --json
    """
    parser = make_parser(count, prog)
    parser.add_argument("config", nargs="*", help="YAML files and key=value overrides")
    parser.add_argument("--all", action="store_true", help="every model of the paper's Tables 1, 2 and 5")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    arguments = parser.parse_args(argv)
    if bool(arguments.config) == arguments.all:
        parser.error("give config files, or --all")

    from rich.console import Console

    from mohd_train.config.catalogue import paper_models
    from mohd_train.config.load import load_model_plan, split_arguments
    from mohd_train.model import count as counting

    rows = paper_models() if arguments.all else [(load_model_plan(*split_arguments(arguments.config)), None)]
    counted = [(plan, counting.count(plan), paper) for plan, paper in rows]
    if arguments.json:
        found = [{"name": plan.name, **counts.to_dict(), "paper": paper} for plan, counts, paper in counted]
        print(json.dumps(found, indent=1))
    else:
        console = Console()
        console.width = max(console.width, 160)  # rather than cut numbers off in a narrow window or a pipe
        console.print(counting.render_counts(counted))


def estimate(argv: Sequence[str], prog: str) -> None:
    """Estimates what a run will take: memory of each GPU, time, disk, data. See docs/before_you_launch.md.

        %(prog)s configs/recipe/paper_50b.yaml configs/model/355m.yaml configs/mohd/x2.yaml --gpus 8 --gpu h100
        %(prog)s CONFIG... [key=value...] [--mfu 0.4] [--json]

    Needs no GPU. Exits with 0 even if the run does not fit: see `fits` in --json.
    """
    parser = make_parser(estimate, prog)
    parser.add_argument("config", nargs="+", metavar="FILE | key=value")
    parser.add_argument("--gpus", type=positive, default=8, help="GPUs over all nodes (default 8)")
    parser.add_argument("--gpu", default="a100-80gb", help="a100-40gb, a100-80gb (default), h100, h200")
    parser.add_argument("--mfu", type=share, help="model FLOPs utilization; default: by GPU and model")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    options = parser.parse_args(argv)

    from mohd_train.config.load import load_config, split_arguments

    config = load_config(*split_arguments(options.config))

    from mohd_train.estimate import launch  # after the config: importing torch takes seconds
    from mohd_train.estimate.hardware import gpu_named
    from mohd_train.estimate.report import render

    found = launch.estimate(config, gpu_named(options.gpu), options.gpus, options.mfu)
    print(json.dumps(found.to_dict(), indent=1) if options.json else render(found))


def train(argv: Sequence[str], prog: str) -> None:
    """Trains a model: YAML files, merged left to right, then key=value overrides.

        composer [-n PROCESSES] scripts/train.py FILE... [key=value...] [--print-config] [--dry-run]    in a checkout
        composer [-n PROCESSES] -c mohd train FILE... [key=value...]                                    anywhere
        %(prog)s FILE... [key=value...]                                                        one process

    A file that is not in the current folder is looked for in the package, as in
        ... configs/recipe/paper_50b.yaml configs/model/355m.yaml configs/mohd/x2.yaml data.local=/data/mds
    """
    parser = make_parser(train, prog)
    parser.add_argument("arguments", nargs="+", metavar="FILE | key=value")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="run every check, write nothing, and exit")
    options = parser.parse_args(argv)

    from mohd_train.config.load import load_config, packaged_files, split_arguments, to_yaml

    files, overrides = split_arguments(options.arguments)
    config = load_config(files, overrides)
    if options.print_config:
        for file, path in packaged_files(files).items():
            print(f"# {file}: {path}")
        print(to_yaml(config), end="")
        return

    from mohd_train.train import train as training  # after the config: importing Composer takes seconds

    (training.dry_run if options.dry_run else training.train)(config)


def export(argv: Sequence[str], prog: str) -> None:
    """A native checkpoint as a Hugging Face folder, with its config and tokenizer.

        %(prog)s runs/355m-x2/checkpoints/latest-rank0.pt exported/355m-x2
        %(prog)s runs/355m-dense/checkpoints/latest-rank0.pt exported/355m --llama

    It loads without this package: `AutoModelForCausalLM.from_pretrained(OUT_DIR, trust_remote_code=True)`; a --llama folder is
    plain LLaMA. After `import mohd_train.hf`, this package's faster kernels run instead of the folder's own code.
    """
    parser = make_parser(export, prog)
    parser.add_argument("checkpoint", type=path_or_uri, help="a checkpoint in its run folder, here or s3://...")
    parser.add_argument("out_dir", type=Path, help="the folder to write; it must be empty or not exist")
    parser.add_argument("--llama", action="store_true", help="write a dense model as LlamaForCausalLM")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--no-check", action="store_true", help="don't load the folder and compare its logits")
    parser.add_argument(
        "--results", type=Path, help="results of `mohd eval` on this checkpoint: its scores, for the model card"
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload the folder to the Hugging Face hub: NAME or ORGANIZATION/NAME"
    )
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")
    arguments = parser.parse_args(argv)

    from mohd_train.hf import export as exporting

    folder = arguments.out_dir
    model = exporting.export(
        arguments.checkpoint,
        folder,
        llama=arguments.llama,
        dtype=arguments.dtype,
        check=not arguments.no_check,
        scores=_scores(arguments.results, arguments.checkpoint) if arguments.results else None,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checked = "" if arguments.no_check else "; loaded without mohd_train, its logits are the checkpoint's"
    print(f"{folder}: {type(model).__name__} with {parameters:,} parameters, its tokenizer and a model card{checked}")
    if arguments.push:
        print(exporting.push(folder, arguments.push, private=arguments.private))


def _scores(results: Path, checkpoint: str | Path) -> dict[str, str]:
    """The scores of this checkpoint as a model card shows them.

    Raises:
        UserError: no results there, or none of this checkpoint.
    """
    from mohd_train.checkpoint import open_native
    from mohd_train.errors import UserError
    from mohd_train.results import load

    frame = load(results)
    fingerprint = open_native(checkpoint).fingerprint
    rows = frame[(frame["fingerprint"] == fingerprint) & frame["value"].notna()]
    if rows.empty:
        raise UserError(
            f"--results {results}: none is of {checkpoint}; measure it with `mohd eval --checkpoint {checkpoint}`"
        )
    scores = {}
    for row in rows.itertuples():
        percent = str(row.metric).startswith(("acc", "exact"))
        shown = f"{100 * row.value:.2f}%" if percent else f"{row.value:.4f}"
        scores[f"{row.task}, {row.metric}"] = shown + (f" ({row.notes})" if row.notes else "")
    return scores


def import_(argv: Sequence[str], prog: str) -> None:
    """A Llama-shaped Hugging Face folder as a native checkpoint to train on: dense, or a MoHD.

        %(prog)s HF_FOLDER imported/dense
        %(prog)s HF_FOLDER imported/75 --mohd configs/mohd/75.yaml --calibrate TEXT_FILE
        %(prog)s HF_FOLDER imported/x2 --mohd configs/mohd/x2.yaml

    OUT_DIR/model.yaml is the config to train it on with, its weights as load_path and load_weights_only=true. --calibrate puts the
    hidden dims that contribute most on that text (8,192 tokens) into the shared sub-dimensions; without it they stay in order.
    """
    parser = make_parser(import_, prog)
    parser.add_argument("hf_dir", type=Path, help="a Hugging Face folder with its tokenizer")
    parser.add_argument("out_dir", type=Path, help="the folder to write; it must be empty or not exist")
    parser.add_argument(
        "--mohd",
        metavar="YAML",
        help="MoHD settings: a compression, or an expansion with one specialized sub-dimension active; default: the dense model",
    )
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="text that decides which hidden dims are shared")
    arguments = parser.parse_args(argv)
    if arguments.calibrate and not arguments.mohd:
        parser.error("--calibrate orders the dims of a MoHD: give --mohd too")

    from mohd_train.config.load import load_mohd
    from mohd_train.errors import UserError

    text = None
    if arguments.calibrate:
        try:
            text = arguments.calibrate.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--calibrate {arguments.calibrate}: {error}") from error
    mohd = load_mohd([arguments.mohd]) if arguments.mohd else None

    from mohd_train.hf.import_llama import CONFIG, import_llama

    checkpoint = import_llama(arguments.hf_dir, arguments.out_dir, mohd=mohd, calibration=text)
    config = arguments.out_dir / CONFIG
    print(
        f"{checkpoint}: train on with\n  mohd train RECIPE.yaml {config} load_path={checkpoint} load_weights_only=true\n"
        f"on data prepared with the tokenizer in {arguments.out_dir / 'tokenizer'}"
    )
