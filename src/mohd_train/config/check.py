"""Rules about a config's values, all checked before anything is built. Ranges of numbers are in ``bounds.py``."""

from __future__ import annotations

import re
from pathlib import Path

from mohd_train.config.bounds import check_numbers
from mohd_train.config.keys import TEXT_KEYS, items, value_of
from mohd_train.config.plan import check_choice, make_plan
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.storage import is_remote
from mohd_train.utils.text import NAME_BYTES, plain_name, printable

DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ba|ep|tok|sp|dur)")
LONGEST = 2**53  # of any unit: counters are int64, and shares of them are computed in float64
CHOICES = {
    "device": ("auto", "cpu", "gpu"),
    "precision": ("amp_bf16", "amp_fp16", "fp32"),
    "kernels": ("auto", "reference", "grouped", "triton"),
    "optimizer.name": ("decoupled_adamw", "adamw"),
    "scheduler.name": ("cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup"),
    "nonfinite_loss": ("stop", "skip"),
    "router_collapse": ("warn", "stop", "ignore"),
    "python_log_level": ("debug", "info", "warning", "error"),
}
# Durations, and the units that each may have.
DURATIONS = {
    "max_duration": ("ba", "ep", "tok", "sp"),
    "eval_interval": ("ba", "ep", "tok", "sp", "dur"),
    "save_interval": ("ba", "ep", "tok", "sp", "dur"),
    "scheduler.t_warmup": ("ba", "ep", "tok", "sp", "dur"),
    "routing_log_interval": ("ba",),
    "router_collapse_time": ("ba",),
    "save_keep_every": ("ba",),
    "console_log_interval": ("ba", "ep"),
}
PATHS = ("run_folder", "save_folder", "load_path", "data.local", "data.remote")  # these may begin with `~`
FILE_NAME_BYTES = 255
# Names that a domain can't have: Composer's label for training, ours for the total over domains, and what lies next to
# the domains in a data folder.
RESERVED_DOMAINS = ("train", "eval", "manifest.json", "tokenizer", "bad_rows.jsonl")


def _check_duration(key: str, value: str, units: tuple[str, ...]) -> None:
    match = DURATION.fullmatch(value)
    if not match or match[2] not in units:
        examples = " or ".join(f'"100{unit}"' for unit in units if unit != "dur")
        raise UserError(f"{key} is {value!r}; it must be a number with a unit, such as {examples}")
    if float(match[1]) == 0 and key != "scheduler.t_warmup":
        raise UserError(f"{key} is {value!r}; it must be more than 0")
    if "." in match[1] and match[2] != "dur":
        raise UserError(f"{key} is {value!r}; only the unit 'dur' (a share of the run) takes a fraction")
    if match[2] == "dur" and float(match[1]) > 1:
        raise UserError(f"{key} is {value!r}; 'dur' is a share of the run, at most 1dur")
    if float(match[1]) > LONGEST:
        raise UserError(f"{key} is {value!r}; it must be at most {LONGEST}")


def _check_warmup(config: Config) -> None:
    """Compares the warm-up with the run in one unit. Epochs and batches are compared once the data is there (train/data.py)."""
    warmup, duration = config.scheduler.t_warmup, config.max_duration
    matches = DURATION.fullmatch(warmup), DURATION.fullmatch(duration)
    assert all(matches), "both were checked to be durations"
    (number, unit), (end, end_unit) = (match.groups() for match in matches if match)
    samples = config.global_train_batch_size
    tokens = {"ba": samples * config.max_seq_len, "sp": config.max_seq_len, "tok": 1}
    if unit != end_unit and not {unit, end_unit} <= tokens.keys():
        return
    if int(number) * tokens.get(unit, 1) > int(end) * tokens.get(end_unit, 1):
        raise UserError(
            f"scheduler.t_warmup is {warmup!r}, longer than the run (max_duration is {duration!r}): the learning rate would "
            'never reach its peak; give a shorter one, or a share of the run such as "0.03dur"'
        )


def check_names(config: Config) -> None:
    """Raises :class:`UserError` for a name that can't be a folder's, before folders are named after it."""
    plain_name(config.model.name, "model.name")
    plain_name(config.mohd.name, "mohd.name")
    name = str(config.run_name)
    refuse_braces("run_name", name)
    for part in name.split("/"):
        plain_name(part, "run_name" if part == name else f"run_name {name!r}: a part")
    if len(name.encode()) > NAME_BYTES:
        raise UserError(f"run_name is {name[:20]!r}... of {len(name.encode())} bytes; a name has at most {NAME_BYTES}")


def refuse_braces(key: str, text: str, known: str = "") -> None:
    """Composer replaces braces such as ``{rank}``: checkpoints would go where resuming doesn't look for them.

    Args:
        known: the placeholders that this key may hold.

    Raises:
        UserError: ``text`` still holds a brace.
    """
    found = re.search(r"\{(\w*)\}?|\}", text)
    if found:
        what = f"unknown placeholder {found[1]!r}" if found[1] else f"it must not hold {found[0]!r}"
        raise UserError(f"{key} is {text!r}: {what}; known: {known or 'none'}")


def _check_text(config: Config) -> None:
    for key in TEXT_KEYS:
        for name, text in items(key, value_of(config, key)):
            printable(text, name)
    for key in PATHS:
        path = value_of(config, key)
        if path is None or is_remote(path):
            continue
        if not path.strip():
            raise UserError(f"{key} is {path!r}; it must be a path")
        if any(len(part.encode()) > FILE_NAME_BYTES for part in Path(path).parts):
            raise UserError(f"{key} has a part of more than {FILE_NAME_BYTES} bytes, which no file system takes")
    if config.load_path:
        refuse_braces("load_path", config.load_path)


def _check_domains(config: Config) -> None:
    domains = config.data.domains
    if not domains:
        raise UserError("data.domains is empty; name the domains and their proportions, such as {cc: 0.67, wiki: 0.33}")
    for name in domains:
        if name in RESERVED_DOMAINS or name.startswith("."):
            raise UserError(f"data.domains.{name} is a reserved name; prepare the domain under another name")
        plain_name(name, "data.domains: a name")
    unknown = [name for name in config.data.optional_domains if name not in domains]
    if unknown:
        raise UserError(f"data.optional_domains names {', '.join(unknown)}, which data.domains does not have")


def check(config: Config) -> None:
    """Raises :class:`UserError` for the first rule that ``config`` breaks."""
    for key, known in CHOICES.items():
        check_choice(key, value_of(config, key), known)
    _check_text(config)
    for key, units in DURATIONS.items():
        if value_of(config, key) is not None:
            _check_duration(key, value_of(config, key), units)
    check_numbers(config)
    if len(config.optimizer.betas) != 2:
        raise UserError(f"optimizer.betas is {config.optimizer.betas}; it must be two numbers in [0, 1)")
    if config.save_num_checkpoints_to_keep == 0 and not is_remote(config.save_folder):
        raise UserError("save_num_checkpoints_to_keep is 0; it must be -1 (all) or at least 1")
    _check_domains(config)
    _check_warmup(config)
    make_plan(config.model, config.mohd, config.max_seq_len)
