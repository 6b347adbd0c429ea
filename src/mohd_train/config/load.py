"""YAML files, merged left to right, then dotted overrides: one typed, checked :class:`Config`.

Each source is checked by itself, so that an error names the file (or the override) and the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mohd_train import resources
from mohd_train.config.check import check
from mohd_train.config.plan import ModelPlan, current_name, make_plan
from mohd_train.config.schema import Config, ModelConfig, MoHDSettings
from mohd_train.errors import UserError
from mohd_train.utils.text import first_line, nearest

log = logging.getLogger(__name__)

# A later source's mapping replaces these whole (a mix is one thing); other mappings merge key by key.
REPLACED_WHOLE = ("data.domains",)


def _schema_of(annotation: Any) -> Any:
    """The dataclass inside ``X`` or ``Optional[X]``, or None."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _all_keys(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its annotation."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        keys[name] = hints[field.name]
        nested = _schema_of(hints[field.name])
        if nested is not None:
            keys |= _all_keys(nested, f"{name}.")
    return keys


KNOWN_KEYS = _all_keys(Config)


def _refuse_unknown(value: Any, source: str, prefix: str = "") -> None:
    """Raises for the first key that the schema does not have."""
    for key, child in value.items():
        name = f"{prefix}{key}"
        if name not in KNOWN_KEYS:
            siblings = [k for k in KNOWN_KEYS if k.startswith(prefix) and "." not in k[len(prefix) :]]
            hint = nearest(name, siblings) or nearest(str(key), [k.rsplit(".", 1)[-1] for k in KNOWN_KEYS])
            raise UserError(f"{source}: unknown key {name!r}{hint}")
        if _schema_of(KNOWN_KEYS[name]) is not None:
            if isinstance(child, dict):
                _refuse_unknown(child, source, f"{name}.")
            elif child is not None:
                raise UserError(f"{source}: {name} is {child!r}; it must be a mapping of keys")


def _packaged(path: str) -> str:
    """The nearest file of the package to a missing ``configs/KIND/NAME.yaml``, as a hint."""
    configs = resources.path("configs")
    names = [f"configs/{file.relative_to(configs).as_posix()}" for file in sorted(configs.rglob("*.yaml"))]
    return nearest(path, names) if path.startswith("configs/") else ""


def _read(path: str) -> dict[str, Any]:
    file = resources.find(path)
    if not file.is_file():
        raise UserError(
            f"{path}: no such config file{_packaged(path)}; give YAML files first, then key=value overrides"
        )
    try:
        value = OmegaConf.to_container(OmegaConf.load(io.StringIO(file.read_text(encoding="utf-8"))), resolve=False)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: broken YAML{where}: {getattr(error, 'problem', None) or first_line(error)}") from None
    except OSError as error:  # OmegaConf's word for a document that is neither a mapping nor a list
        raise UserError(f"{path}: holds no mapping of keys to values ({first_line(error)})") from None
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no mapping of keys to values")
    return typing.cast("dict[str, Any]", value)


def _pop(mapping: dict[str, Any], dotted: str) -> Any:
    """Takes a nested value out of ``mapping``; None where it is not there."""
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.get(parent) or {}
    return mapping.pop(last, None) if isinstance(mapping, dict) else None


def _merge(config: DictConfig, value: dict[str, Any], source: str, *, replace: bool) -> None:
    try:
        whole = {key: _pop(value, key) for key in REPLACED_WHOLE} if replace else {}
        config.merge_with(value)  # in place: OmegaConf.merge copies the whole config for every word of a command line
        for key, mapping in whole.items():
            if mapping is not None:
                OmegaConf.update(config, key, mapping, merge=False)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None)
        raise UserError(f"{source}: {f'{where}: ' if where else ''}{first_line(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: {first_line(error)}") from None


def _override(text: str) -> tuple[dict[str, Any], bool]:
    """``key=value`` as a nested mapping, and whether it gives a whole mapping that replaces the earlier one."""
    key, sign, _ = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text!r} is neither a YAML file nor an override; overrides look like key=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {text!r}: {first_line(error)}") from None
    assert isinstance(value, dict)
    return typing.cast("dict[str, Any]", value), key in REPLACED_WHOLE


def _resolve(config: Config) -> Config:
    """Fills in what follows from other keys, under today's names."""
    scaling = current_name("mohd.scaling", config.mohd.scaling)
    if scaling != config.mohd.scaling:
        log.warning("mohd.scaling: %s is called %s now", config.mohd.scaling, scaling)
        config.mohd.scaling = scaling
    config.run_name = config.run_name or f"{config.model.name}-{config.mohd.name}"
    try:
        config.run_folder = config.run_folder.format(run_name=config.run_name)
        config.save_folder = config.save_folder.format(run_name=config.run_name, run_folder=config.run_folder)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"run_folder, save_folder: unknown placeholder {error}; known: {{run_name}}, {{run_folder}}"
        ) from None
    if config.optimizer.router_lr is None:
        config.optimizer.router_lr = config.optimizer.lr
    if config.data.shuffle_seed is None:
        config.data.shuffle_seed = config.seed
    return config


def packaged_files(files: list[str]) -> dict[str, Path]:
    """Those of ``files`` that are not where the user is but come with the package, and where they are."""
    found = {file: resources.find(file) for file in files}
    return {file: path for file, path in found.items() if path != Path(file)}


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line as (YAML files, key=value overrides)."""
    files = [word for word in arguments if "=" not in word]
    return files, [word for word in arguments if "=" in word]


def _merge_all(files: list[str], overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """All sources merged, and where each key was last set."""
    config: DictConfig = OmegaConf.structured(Config)
    origin: dict[str, str] = {}
    sources = [(path, _read(path), True) for path in files]
    sources += [(f"override {text!r}", *_override(text)) for text in overrides]
    for source, value, replace in sources:
        _refuse_unknown(value, source)
        origin |= dict.fromkeys(_leaves(value), source)
        _merge(config, value, source, replace=replace)
    return config, origin


def _leaves(value: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key in ``value``, inner nodes too."""
    keys = []
    for key, child in value.items():
        keys.append(f"{prefix}{key}")
        if isinstance(child, dict):
            keys += _leaves(child, f"{prefix}{key}.")
    return keys


@contextlib.contextmanager
def _naming_the_source(origin: dict[str, str]) -> Iterator[None]:
    """Adds to an error that begins with a key where that key was set."""
    try:
        yield
    except UserError as error:
        key = str(error).split(" ", 1)[0]
        if key not in origin:
            raise
        raise UserError(f"{origin[key]}: {error}") from None


def load_config(files: list[str], overrides: list[str] | None = None) -> Config:
    """Merges files left to right, then overrides, and checks the result.

    Raises:
        UserError: an unknown key, a wrong type, a missing value or an impossible combination; the message names
            the file, the key and the remedy.
    """
    config, origin = _merge_all(files, overrides or [])
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(
                f"no value for {', '.join(missing)}; give a recipe (configs/recipe), a model (configs/model) "
                "and MoHD settings (configs/mohd)"
            )
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {first_line(error)}") from None
    assert isinstance(result, Config)
    with _naming_the_source(origin):
        check(_resolve(result))
    return result


def load_model_plan(files: list[str], overrides: list[str] | None = None) -> ModelPlan:
    """The model alone, from files that need not hold a whole run (``configs/model/355m.yaml configs/mohd/x2.yaml``).

    Raises:
        UserError: as :func:`load_config`.
    """
    config, origin = _merge_all(files, overrides or [])
    missing = sorted(key for key in OmegaConf.missing_keys(config) if key.startswith(("model.", "mohd.")))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}; give a model, such as configs/model/355m.yaml")
    try:
        model, mohd = OmegaConf.to_object(config.model), OmegaConf.to_object(config.mohd)
        max_seq_len = config.max_seq_len
    except OmegaConfBaseException as error:
        raise UserError(f"config: {first_line(error)}") from None
    with _naming_the_source(origin):
        return make_plan(typing.cast("ModelConfig", model), typing.cast("MoHDSettings", mohd), max_seq_len)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
