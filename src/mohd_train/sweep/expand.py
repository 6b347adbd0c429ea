"""From a sweep file to named runs, each with the command line that a user would type for it and its checked config."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mohd_train.config.load import load_config, load_model_plan
from mohd_train.config.plan import ModelPlan, SubDimPlan, make_plan
from mohd_train.config.schema import Config, ModelConfig
from mohd_train.errors import UserError
from mohd_train.sweep.file import CONFIGS, Setting, SweepFile
from mohd_train.sweep.scale import SCALES, scaled_model
from mohd_train.utils.text import nearest

# Keys that the sweep sets for each run; an override of one would put two runs in one folder.
RESERVED = ("run_name", "run_folder", "save_folder", "seed", "autoresume", "save_overwrite", "data.local")


@dataclass(frozen=True)
class Choice:
    """Which of a sweep's runs are wanted, and what they share.

    Attributes:
        scale: one of ``SCALES``.
        seeds: in place of the file's.
        only: patterns of run names (``*x2*``), settings or models.
        overrides: ``key=value`` for every run.
        data: of the prepared data: its folder and what follows from its manifest, as ``key=value``.
    """

    scale: str = "paper"
    seeds: tuple[int, ...] | None = None
    only: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: ``scripts/train.py FILES OVERRIDES``."""

    name: str
    model: str
    setting: str
    label: str
    seed: int
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    config: Config = field(repr=False)

    @property
    def plan(self) -> ModelPlan:
        """The model."""
        return make_plan(self.config.model, self.config.mohd, self.config.max_seq_len)


def default_folder(sweep: SweepFile, scale: str) -> Path:
    """``runs/sweep/table4``, ``runs/sweep/table4-tiny``."""
    return Path("runs/sweep") / (sweep.name if scale == "paper" else f"{sweep.name}-{scale}")


def total_batches(config: Config) -> int | None:
    """Batches of a whole run; None where they depend on the data (epochs)."""
    match = re.fullmatch(r"(\d+)(ba|tok|sp)", config.max_duration)
    if not match:
        return None
    per_batch = {
        "ba": 1,
        "sp": config.global_train_batch_size,
        "tok": config.global_train_batch_size * config.max_seq_len,
    }
    return -(-int(match[1]) // per_batch[match[2]])


def expand(sweep: SweepFile, choice: Choice, folder: Path) -> list[SweepRun]:
    """Every run that ``choice`` selects: block by block as in the file, and seed by seed within a block.

    Args:
        folder: the sweep's, in which each run gets a folder of its own name.

    Raises:
        UserError: an invalid config (it names the file and the run), two runs of one name, an ``only`` that matches nothing.
    """
    if choice.scale not in SCALES:
        raise UserError(f"--scale {choice.scale}: it must be one of {', '.join(SCALES)}")
    _refuse_reserved(choice.overrides)
    runs: dict[str, SweepRun] = {}
    bases: dict[Path, ModelConfig] = {}
    for block in sweep.blocks:
        for seed in choice.seeds or block.seeds:
            for model in block.models:
                for setting in block.settings:
                    run = _run(sweep, choice, folder, model, setting, seed, bases)
                    if choice.seeds and run.name in runs and runs[run.name].config == run.config:
                        continue  # blocks that differ in their seeds alone, which are set aside here
                    if run.name in runs:
                        raise UserError(
                            f"{sweep.path}: two runs are called {run.name}; give their settings different names"
                        )
                    runs[run.name] = run
    return select(list(runs.values()), choice.only)


def select(runs: list[SweepRun], only: Sequence[str]) -> list[SweepRun]:
    """The runs whose name, setting or model matches one of the patterns; all if there are none.

    Raises:
        UserError: a pattern that matches none.
    """
    if not only:
        return runs
    chosen = set()
    for pattern in only:
        matching = {run.name for run in runs if any(fnmatch.fnmatch(word, pattern) for word in _names(run))}
        if not matching:
            names = sorted({name for run in runs for name in _names(run)})
            raise UserError(
                f"--only {pattern}: no run, setting or model of that name{nearest(pattern, names)}; "
                f"settings: {', '.join(dict.fromkeys(run.setting for run in runs))}"
            )
        chosen |= matching
    return [run for run in runs if run.name in chosen]


def _names(run: SweepRun) -> tuple[str, ...]:
    return run.name, run.name.removesuffix(f"-s{run.seed}"), run.setting, run.model


def _refuse_reserved(overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0]
        if key in RESERVED:
            raise UserError(f"override {text!r}: the sweep itself sets {key} for each run (see --seeds, --out, --data)")


def _run(
    sweep: SweepFile,
    choice: Choice,
    folder: Path,
    model: Path,
    setting: Setting,
    seed: int,
    bases: dict[Path, ModelConfig],
) -> SweepRun:
    scale = SCALES[choice.scale]
    recipe = CONFIGS / "recipe" / f"{scale.recipe}.yaml" if scale.recipe else sweep.recipe
    files = [_shown(path) for path in (recipe, model, setting.base)]
    where = f"{sweep.path}: {model.stem}, {setting.name}"
    try:
        base = bases.get(model) or bases.setdefault(model, load_config(files).model)
        scaled = {f"model.{key}": value for key, value in scaled_model(base, scale).items()}
        overrides = _overrides(scaled) + _setting_overrides(setting, files[1])
        name = scaled.get("model.name", base.name)
        full = f"{name}-{setting.name}-s{seed}"
        identity = {
            "run_name": full,
            "run_folder": str(folder / full),
            "seed": seed,
            "autoresume": True,
            "save_overwrite": False,
        }
        overrides = [*overrides, *choice.data, *choice.overrides, *_overrides(identity)]
        config = load_config(files, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return SweepRun(full, str(name), setting.name, setting.label, seed, tuple(files), tuple(overrides), config)


def _shown(path: Path) -> str:
    """Relative to where the user is, if it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _overrides(values: dict[str, Any]) -> list[str]:
    """``key=value`` overrides, quoted (JSON is YAML) where YAML would read a string as something else, such as 100 as a number."""

    def word(value: Any) -> str:
        plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value
        return str(value) if plain else json.dumps(value)

    return [f"{key}={word(value)}" for key, value in values.items()]


def _setting_overrides(setting: Setting, model: str) -> list[str]:
    """What a setting changes of its file."""
    if setting.plain:
        return []
    values: dict[str, Any] = {"mohd.name": setting.name}
    for part, said in (("attention", setting.attention or setting.both), ("ffn", setting.ffn or setting.both)):
        if isinstance(said, Path):
            base, other = (load_model_plan([model, _shown(file)]) for file in (setting.base, said))
            if other.hidden_size != base.hidden_size:
                raise UserError(
                    f"{part} of {said.stem} is {other.hidden_size} wide, {setting.base.stem} is {base.hidden_size}; "
                    "both components must tile the same hidden size: name a base of that expansion"
                )
            values[f"mohd.{part}"] = _numbers(getattr(other, part))
        elif said:
            values |= {f"mohd.{part}.{key}": number for key, number in said.items()}
    return _overrides(values | setting.overrides)


def _numbers(part: SubDimPlan | None) -> dict[str, int] | None:
    return {"sub_dims": part.sub_dims, "top_k": part.top_k, "shared_sub_dims": part.shared} if part else None
