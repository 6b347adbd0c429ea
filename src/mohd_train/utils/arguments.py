"""Command lines: what the parsers of this package have in common. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SUBMIT_ARGS = "--submit-args"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """argparse's, with help printed as it is written, and ``~`` expanded in paths: a shell expands ``--out ~/x``, but not
    ``--out=~/x``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})
        self.register("type", Path, lambda text: Path(text).expanduser())

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options and positional arguments in any order: ``FILE --gpus 8 key=value``, too."""
        args = _joined(list(sys.argv[1:] if args is None else args))
        if self._subparsers is not None:  # whose arguments argparse takes in order
            return super().parse_args(args, namespace)
        return self.parse_intermixed_args(args, namespace)


def _joined(args: list[str]) -> list[str]:
    """``--submit-args --partition=cpu`` joined by an equals sign: argparse would take the second argument for an option."""
    joined: list[str] = []
    for arg in args:
        if joined[-1:] == [SUBMIT_ARGS]:
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


@dataclass(kw_only=True)
class LoadOptions:
    """How a command loads the checkpoint that it is given."""

    tokenizer: Path | None = None  # a folder; default: the checkpoint's own
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # one of DTYPES; auto: as stored
    trust_remote_code: bool = False  # of a Hugging Face folder

    def loading(self) -> dict[str, Any]:
        """These four alone, as keyword arguments."""
        return {field.name: getattr(self, field.name) for field in fields(LoadOptions)}


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """How jobs are submitted to a scheduler: what :class:`mohd_train.utils.jobs.ClusterOptions` is made from."""
    parser.add_argument(SUBMIT_ARGS, default="", help="more arguments for sbatch or kubectl apply, in quotes")
    parser.add_argument("--template", type=Path, help="of the jobs; default: in scripts/launch")
    parser.add_argument("--image", help="k8s: container image")
    parser.add_argument("--namespace", default="default", help="k8s; default: %(default)s")
    parser.add_argument("--claim", metavar="PVC:PATH", help="k8s: volume with checkout, data and runs, and where it is")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`LoadOptions`."""
    default = LoadOptions()
    parser.add_argument("--tokenizer", type=Path, help="folder; default: the checkpoint's own")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:N; default: %(default)s")
    parser.add_argument("--dtype", default=default.dtype, choices=DTYPES, help="of the weights; auto: as stored")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that a Hugging Face folder may hold"
    )


def given_load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Their values, as keyword arguments."""
    return {field.name: getattr(arguments, field.name) for field in fields(LoadOptions)}
