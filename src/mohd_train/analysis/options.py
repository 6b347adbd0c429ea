"""Options of `mohd observe`. Imports nothing heavy, so that --help and usage errors are instant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mohd_train.resources import find
from mohd_train.utils.arguments import LoadOptions, Parser, add_load_options, given_load_options

INTERVENTIONS = ("removed", "banned", "forced")  # defined in mohd_train.analysis.interventions
MAGNITUDES = ("square", "absolute")  # the paper's (eq. 1), and |x|


@dataclass(frozen=True)
class StudyOptions:
    """What is measured, and what counts as active. ``shares`` and ``highly_active`` are shares of a token's dims."""

    tokens: int = 32768
    batch_size: int = 4
    layer: int | None = None  # studied in detail; default: the middle one
    top_dims: int | None = None  # default: 1000 of 4096, scaled to D
    shares: tuple[float, ...] = (0.2, 0.8)
    highly_active: float = 0.2  # of the map (Fig. 5)
    map_tokens: int = 5
    attention_module: str | None = None
    ffn_module: str | None = None
    magnitude: str = "square"  # one of MAGNITUDES
    epsilon: float = 0.01  # magnitudes below it count as sparse (eq. 2); the paper gives no value


@dataclass(frozen=True)
class KnockoutOptions:
    """Which interventions in which layers. No ``layers``: all of them."""

    tokens: int = 8192
    batch_size: int = 4
    layers: tuple[int, ...] = ()
    kinds: tuple[str, ...] = INTERVENTIONS


@dataclass
class ObserveOptions(LoadOptions):
    """One run of `mohd observe`."""

    model: str
    data: Path
    output: Path | None  # default: runs/observe/NAME
    seq_len: int | None
    study: StudyOptions
    knockout: KnockoutOptions | None
    tasks: tuple[str, ...]
    task_data: Path | None
    limit: int | None
    overwrite: bool


def parse(description: str | None, arguments: Sequence[str] | None = None, prog: str | None = None) -> ObserveOptions:
    """Parses the command line. A usage error exits through argparse, with 2."""
    parser = Parser(prog=prog, description=description)
    add = parser.add_argument
    study, knockout = StudyOptions(), KnockoutOptions()
    add("--model", required=True, help="checkpoint (.pt), Hugging Face folder, or a name on the hub")
    add(
        "--data",
        type=Path,
        required=True,
        help="prepared data folder, or text: .txt, .jsonl[.gz|.zst], or a folder of them",
    )
    add("--output", type=Path, help="default: runs/observe/NAME_OF_THE_MODEL")
    add(
        "--tokens",
        type=_positive,
        default=study.tokens,
        help="tokens to read, an equal part from each domain; default: %(default)s",
    )
    add("--seq-len", type=_positive, help="default: the prepared data's, else 1024 or the model's limit")
    add("--batch-size", type=_positive, default=study.batch_size, help="sequences at once; default: %(default)s")
    add("--layer", type=int, help="layer to study in detail, from 0; default: the middle one")
    add(
        "--top-dims",
        type=_positive,
        help="dims whose share of the magnitude is reported; default: 1000 of 4096, scaled to D",
    )
    add(
        "--active",
        type=_shares,
        default=study.shares,
        help="shares of a token's dims that count as active; default: 0.2,0.8",
    )
    add("--highly-active", type=float, default=study.highly_active, help="the same, for the map; default: %(default)s")
    add("--map-tokens", type=_positive, default=study.map_tokens, help="tokens in the map; default: %(default)s")
    add("--magnitude", default=study.magnitude, choices=MAGNITUDES, help="of a dim: x**2 (the paper's), or |x|")
    add("--epsilon", type=_number, default=study.epsilon, help="magnitudes below it are sparse; default: %(default)s")
    add("--attention-module", help="name of a block's attention, if it isn't recognized")
    add("--ffn-module", help="name of a block's feed-forward part, if it isn't recognized")
    add(
        "--overwrite", action="store_true", help="replace a stored observation of another model, or with other settings"
    )
    add_load_options(parser)
    add("--knockout", action="store_true", help="intervene on every sub-dimension of a MoHD checkpoint")
    add("--interventions", type=_split, default=knockout.kinds, help=f"some of {','.join(INTERVENTIONS)}; default: all")
    add(
        "--knockout-tokens",
        type=_positive,
        default=knockout.tokens,
        help="tokens for the perplexity; default: %(default)s",
    )
    add("--knockout-layers", type=_numbers, default=knockout.layers, help="such as 0,5,11; default: all")
    add("--tasks", type=_split, default=(), help="score these tasks under every intervention too (slow)")
    add("--task-data", type=find, help="rows of the tasks, like mohd eval --data-dir; default: the hub")
    add("--limit", type=_positive, help="examples per task")
    found = parser.parse_args(arguments)
    for name in ("interventions", "knockout_layers", "tasks", "task_data", "limit"):
        if not found.knockout and getattr(found, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} needs --knockout")
    if not found.tasks and (found.task_data or found.limit):
        parser.error("--task-data and --limit need --tasks")
    return ObserveOptions(
        model=found.model,
        data=found.data,
        output=found.output,
        seq_len=found.seq_len,
        study=StudyOptions(
            found.tokens,
            found.batch_size,
            found.layer,
            found.top_dims,
            found.active,
            found.highly_active,
            found.map_tokens,
            found.attention_module,
            found.ffn_module,
            found.magnitude,
            found.epsilon,
        ),
        knockout=(
            KnockoutOptions(found.knockout_tokens, found.batch_size, found.knockout_layers, found.interventions)
            if found.knockout
            else None
        ),
        tasks=found.tasks,
        task_data=found.task_data,
        limit=found.limit,
        overwrite=found.overwrite,
        **given_load_options(found),
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[,\s]+", text) if part)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _split(text))


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in _split(text))


# argparse names a type by its __name__ in "invalid positive number value: '-3'".
_positive.__name__ = _number.__name__ = "positive number"
_split.__name__ = _numbers.__name__ = _shares.__name__ = "list"
