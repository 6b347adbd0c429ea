"""A sweep file: which models x settings x seeds to train with which recipe. It refers to files of `configs/` and copies none.

    name: table4
    title: "Table 4: ..."
    recipe: ablation_10b                   # configs/recipe/ablation_10b.yaml
    seeds: [17]
    runs:
      - models: [355m]                     # configs/model/355m.yaml
        settings:
          - x2                             # configs/mohd/x2.yaml
          - {name: x2-no-fusion, base: x2, label: without group fusion, set: {mohd.fusion: none}}

A name that ends in `.yaml` is a path, relative to the sweep file. An entry of `runs` may also hold, for all of its settings:

        seeds: [17, 18]                    # in place of the file's
        suffix: torch                      # its settings are called x2-torch, ...: a variant of those without it
        label: torch's initialization      # in words, after the settings' own
        set: {model.init: torch}           # keys of the config

and `comparisons` says which of the runs are to be compared (mohd study):

    comparisons:
      - title: "Table 4"
        baseline: x2
        paper: 10.25                       # the paper's perplexity of the baseline, where it has one
        rows: {x2-no-fusion: 10.47, x2-random: null}
        variants: [null, torch]            # suffixes; default: [null], the runs without one
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mohd_train import resources
from mohd_train.config.keys import KNOWN_KEYS, is_text
from mohd_train.errors import UserError
from mohd_train.utils.text import nearest

CONFIGS = resources.root() / "configs"
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
SUB_DIMENSION_KEYS = ("sub_dims", "top_k", "shared_sub_dims")


@dataclass(frozen=True)
class Setting:
    """The MoHD settings of a run: a file of ``configs/mohd``, and what differs from it.

    Attributes:
        name: in run names and tables; also ``mohd.name``.
        base: the file.
        label: in words, for tables and figures; where the paper has such a row, its name there.
        both: N, K, S of attention and FFN, those that differ from the base's.
        attention, ffn: the same for one component; or the setting whose component it takes (Table 5).
        overrides: dotted keys of the config.
    """

    name: str
    base: Path
    label: str
    both: dict[str, int]
    attention: dict[str, int] | Path
    ffn: dict[str, int] | Path
    overrides: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether nothing differs from the file."""
        return not (self.both or self.attention or self.ffn or self.overrides)


@dataclass(frozen=True)
class Block:
    """Every model with every setting and seed."""

    models: tuple[Path, ...]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Settings to be compared with a baseline, within each variant.

    Attributes:
        title: in words.
        baseline: the setting; None: the rows' losses are shown side by side, a column for each variant (a grid of learning rates).
        paper: the baseline's perplexity in the paper; None where it has none.
        rows: setting -> its perplexity in the paper, or None.
        variants: suffixes of settings; an empty one is the settings without.
    """

    title: str
    baseline: str | None
    paper: float | None
    rows: dict[str, float | None]
    variants: tuple[str, ...]


def variant_name(setting: str, variant: str) -> str:
    """``x2-torch``: what a setting is called in a variant."""
    return f"{setting}-{variant}" if variant else setting


@dataclass(frozen=True)
class SweepFile:
    """The content of a sweep file."""

    path: Path
    name: str
    title: str
    recipe: Path
    blocks: tuple[Block, ...]
    comparisons: tuple[Comparison, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed of any block."""
        return tuple(dict.fromkeys(seed for block in self.blocks for seed in block.seeds))


class _Reader:
    """Parses one file; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {key}{' ' if problem[:2] != ': ' else ''}{problem}")

    def mapping(self, value: Any, key: str, known: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key or "the file", f"is {value!r}; it must be a mapping of keys ({', '.join(known)})")
        for name in value:
            if name not in known:
                where = f"{key}." if key else ""
                raise UserError(f"{self.path}: unknown key {where + str(name)!r}{nearest(str(name), list(known))}")
        for name in required:
            if value.get(name) is None:
                raise self.fail(f"{key}.{name}" if key else name, "is missing")
        return value

    def sequence(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.fail(key, f"is {value!r}; it must be a list of at least one")
        return value

    def word(self, value: Any, key: str) -> str:
        """A name that can be a folder's; YAML reads a bare 50 as a number."""
        text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
        if not NAME.match(text):
            raise self.fail(key, f"is {value!r}; it must be a name of letters, digits, '.', '_' and '-'")
        return text

    def config(self, kind: str, value: Any, key: str) -> Path:
        """The config file that a name refers to."""
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            path = self.path.parent / value
            if not path.is_file():
                raise self.fail(key, f"names {value}, and there is no file {path}")
            return path
        name = self.word(value, key)
        path = CONFIGS / kind / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in (CONFIGS / kind).glob("*.yaml"))
            hint = nearest(name, known) or f"; it has {', '.join(known)}"
            raise self.fail(key, f"is {name!r}, which configs/{kind} does not have{hint}")
        return path

    def sub_dimensions(self, value: Any, key: str) -> dict[str, int]:
        mapping = self.mapping(value, key, SUB_DIMENSION_KEYS, ())
        for name, number in mapping.items():
            if not isinstance(number, int) or isinstance(number, bool):
                raise self.fail(f"{key}.{name}", f"is {number!r}; it must be a whole number")
        return mapping

    def component(self, value: Any, key: str) -> dict[str, int] | Path:
        if value is None:
            return {}
        return self.sub_dimensions(value, key) if isinstance(value, dict) else self.config("mohd", value, key)

    def setting(self, value: Any, key: str) -> Setting:
        if not isinstance(value, dict):
            base = self.config("mohd", value, key)
            return Setting(base.stem, base, base.stem, {}, {}, {}, {})
        known = ("name", "base", "label", "both", "attention", "ffn", "set")
        mapping = self.mapping(value, key, known, ("name",))
        name = self.word(mapping["name"], f"{key}.name")
        key = f"{key} ({name})"
        parts = {part: self.component(mapping.get(part), f"{key}.{part}") for part in ("attention", "ffn")}
        both = self.sub_dimensions(mapping.get("both") or {}, f"{key}.both")
        if both and (parts["attention"] or parts["ffn"]):
            raise self.fail(f"{key}.both", "and attention or ffn exclude each other; give one of them")
        overrides = self.config_keys(mapping, key)
        base = self.config("mohd", mapping.get("base", "dense"), f"{key}.base")
        setting = Setting(
            name, base, str(mapping.get("label") or name), both, parts["attention"], parts["ffn"], overrides
        )
        if setting.plain and name != base.stem:
            raise self.fail(key, f"does not differ from {base.stem}; give set, both, attention or ffn")
        return setting

    def config_keys(self, mapping: dict[str, Any], key: str) -> dict[str, Any]:
        values = mapping.get("set") or {}
        if not isinstance(values, dict):
            raise self.fail(f"{key}.set", f"is {values!r}; it must be a mapping of dotted config keys to values")
        for name, found in values.items():
            if name in KNOWN_KEYS and is_text(KNOWN_KEYS[name]) and not isinstance(found, str | None):
                raise self.fail(
                    f"{key}.set.{name}", f"is {found!r}, which YAML does not read as text; put it in quotes"
                )
        return values

    def seeds(self, value: Any, key: str = "seeds") -> tuple[int, ...]:
        seeds = self.sequence(value, key)
        for seed in seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
                raise self.fail(key, f"holds {seed!r}; a seed is a whole number, 0 or more")
        return tuple(dict.fromkeys(seeds))

    def block(self, value: Any, key: str, seeds: tuple[int, ...]) -> Block:
        known = ("models", "settings", "seeds", "suffix", "label", "set")
        mapping = self.mapping(value, key, known, ("models", "settings"))
        models = self.sequence(mapping["models"], f"{key}.models")
        values = self.sequence(mapping["settings"], f"{key}.settings")
        settings = [self.setting(setting, f"{key}.settings[{i}]") for i, setting in enumerate(values)]
        suffix = self.word(mapping["suffix"], f"{key}.suffix") if mapping.get("suffix") is not None else ""
        label, ours = mapping.get("label"), self.config_keys(mapping, key)
        return Block(
            tuple(self.config("model", model, f"{key}.models") for model in models),
            tuple(
                dataclasses.replace(
                    one,
                    name=variant_name(one.name, suffix),
                    label=f"{one.label}, {label}" if label else one.label,
                    overrides=ours | one.overrides,
                )
                for one in settings
            ),
            self.seeds(mapping["seeds"], f"{key}.seeds") if mapping.get("seeds") is not None else seeds,
        )

    def comparison(self, value: Any, key: str, settings: set[str]) -> Comparison:
        known = ("title", "baseline", "paper", "rows", "variants")
        mapping = self.mapping(value, key, known, ("title", "rows"))
        rows = mapping["rows"]
        if not isinstance(rows, dict):
            rows = dict.fromkeys(self.sequence(rows, f"{key}.rows"))
        numbers = {"paper": mapping.get("paper"), **{f"rows.{name}": number for name, number in rows.items()}}
        for name, number in numbers.items():
            if number is not None and (not isinstance(number, int | float) or isinstance(number, bool) or number <= 1):
                raise self.fail(f"{key}.{name}", f"is {number!r}; it must be a perplexity, or null where there is none")
        baseline = self.word(mapping["baseline"], f"{key}.baseline") if mapping.get("baseline") is not None else None
        variants = self.sequence(mapping.get("variants", [None]), f"{key}.variants")
        found = Comparison(
            str(mapping["title"]),
            baseline,
            mapping.get("paper"),
            {self.word(name, f"{key}.rows"): number for name, number in rows.items()},
            tuple("" if one is None else self.word(one, f"{key}.variants") for one in variants),
        )
        for variant in found.variants:
            for name in [*([baseline] if baseline else []), *found.rows]:
                full = variant_name(name, variant)
                if full not in settings:
                    raise self.fail(
                        key, f"compares {full!r}, which no entry of runs has{nearest(full, sorted(settings))}"
                    )
        return found


def read_sweep(path: str | Path) -> SweepFile:
    """Reads and checks a sweep file; ``study`` is ``configs/sweep/study.yaml``.

    Raises:
        UserError: no such file, broken YAML, an unknown key or name (with the nearest known one), a wrong type.
    """
    named = CONFIGS / "sweep" / f"{path}.yaml"
    path = named if named.parent == CONFIGS / "sweep" and named.is_file() else resources.find(path)
    reader = _Reader(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in (CONFIGS / "sweep").glob("*.yaml")))
        raise UserError(f"{path}: no such sweep file; configs/sweep has {known}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder without sweep.json: neither a sweep file nor a launched sweep") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: broken YAML{where}: {getattr(error, 'problem', None) or error}") from None
    known_keys = ("name", "title", "recipe", "seeds", "runs", "comparisons")
    mapping = reader.mapping(content, "", known_keys, ("name", "recipe", "runs"))
    seeds = reader.seeds(mapping.get("seeds", [17]))
    blocks = [
        reader.block(value, f"runs[{i}]", seeds) for i, value in enumerate(reader.sequence(mapping["runs"], "runs"))
    ]
    settings = {setting.name for block in blocks for setting in block.settings}
    compared = reader.sequence(mapping["comparisons"], "comparisons") if mapping.get("comparisons") else []
    return SweepFile(
        path=path,
        name=reader.word(mapping["name"], "name"),
        title=str(mapping.get("title") or mapping["name"]),
        recipe=reader.config("recipe", mapping["recipe"], "recipe"),
        blocks=tuple(blocks),
        comparisons=tuple(reader.comparison(one, f"comparisons[{i}]", settings) for i, one in enumerate(compared)),
    )


def all_sweeps() -> list[SweepFile]:
    """Every sweep of ``configs/sweep``, by name."""
    return [read_sweep(path) for path in sorted((CONFIGS / "sweep").glob("*.yaml"))]
