"""YAML files, merged left to right, then dotted overrides, as one typed and checked :class:`Config`.

Each source is checked by itself, so that an error names the file (or the override) and the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mohd_train import resources
from mohd_train.config.check import PATHS, check, check_names, refuse_braces
from mohd_train.config.keys import KNOWN_KEYS, schema_of
from mohd_train.config.plan import ModelPlan, current_name, make_plan
from mohd_train.config.read import read_file, read_override
from mohd_train.config.read import split_arguments as split_arguments
from mohd_train.config.schema import Config, ModelConfig, MoHDSettings
from mohd_train.errors import UserError
from mohd_train.storage import is_remote
from mohd_train.utils.text import first_line, nearest

log = logging.getLogger(__name__)

RUN_CONFIG, RUN_RECORD = "config.yaml", "run.json"  # of a run folder
# A later source replaces these mappings (a mix is one thing); other mappings merge key by key.
REPLACED = ("data.domains",)


def _refuse_unknown(value: Any, source: str, prefix: str = "") -> None:
    """Raises for the first key that the schema lacks."""
    for key, child in value.items():
        name = f"{prefix}{key}"
        if name not in KNOWN_KEYS:
            siblings = [k for k in KNOWN_KEYS if k.startswith(prefix) and "." not in k[len(prefix) :]]
            hint = nearest(name, siblings) or nearest(str(key), [k.rsplit(".", 1)[-1] for k in KNOWN_KEYS])
            raise UserError(f"{source}: unknown key {name!r}{hint}")
        if schema_of(KNOWN_KEYS[name]) is not None:
            if isinstance(child, dict):
                _refuse_unknown(child, source, f"{name}.")
            elif child is not None:
                raise UserError(f"{source}: {name} is {child!r}; it must be a mapping of keys")


def _pop(mapping: dict[str, Any], dotted: str) -> Any:
    """Removes a nested value from ``mapping`` and returns it; None where there is none."""
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.get(parent) or {}
    return mapping.pop(last, None) if isinstance(mapping, dict) else None


def _merge(config: DictConfig, value: dict[str, Any], source: str, *, replace: bool) -> None:
    try:
        replaced = {key: _pop(value, key) for key in REPLACED} if replace else {}
        config.merge_with(value)  # in place: OmegaConf.merge copies the whole config for every word of a command line
        for key, mapping in replaced.items():
            if mapping is not None:
                OmegaConf.update(config, key, mapping, merge=False)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None)
        raise UserError(f"{source}: {f'{where}: ' if where else ''}{first_line(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: {first_line(error)}") from None


def _resolve(config: Config) -> Config:
    """Fills in names and paths, and replaces values that were renamed."""
    scaling = current_name("mohd.scaling", config.mohd.scaling)
    if scaling != config.mohd.scaling:
        log.warning("mohd.scaling: %s is now called %s", config.mohd.scaling, scaling)
        config.mohd.scaling = scaling
    config.run_name = config.run_name or f"{config.model.name}-{config.mohd.name}"
    check_names(config)
    config.run_folder = _path("run_folder", config.run_folder, run_name=config.run_name)
    config.save_folder = _path(
        "save_folder", config.save_folder, run_name=config.run_name, run_folder=config.run_folder
    )
    config.load_path = config.load_path and _home_expanded("load_path", config.load_path)
    config.data.local = _home_expanded("data.local", config.data.local)
    config.data.remote = config.data.remote and _home_expanded("data.remote", config.data.remote)
    return config


def _follow(config: Config) -> Config:
    """Sets what defaults to another key's value; after the checks, whose errors name the key that the user set."""
    if config.optimizer.router_lr is None:
        config.optimizer.router_lr = config.optimizer.lr
    if config.data.shuffle_seed is None:
        config.data.shuffle_seed = config.seed
    return config


def packaged_files(files: list[str]) -> dict[str, Path]:
    """Those of ``files`` that are found in the package, not in the current folder, and where they are."""
    found = {file: resources.find(file) for file in files}
    return {file: path for file, path in found.items() if path != Path(file)}


def _path(key: str, text: str, **values: str) -> str:
    """``text`` with its placeholders filled in and ``~`` expanded."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    refuse_braces(key, text, ", ".join(f"{{{name}}}" for name in values))
    return _home_expanded(key, text)


def _home_expanded(key: str, path: str) -> str:
    """A local path with ``~`` or ``~user`` expanded. Raises UserError for an unknown user."""
    assert key in PATHS
    if is_remote(path) or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise UserError(
            f"{key} is {path!r}; there is no such home folder (./{path} is a folder of that name)"
        ) from None


def _following(path: str, value: dict[str, Any]) -> dict[str, Any]:
    """A config, with ``save_folder`` relative to ``run_folder`` in a run folder's own, where earlier versions wrote it out."""
    run_folder, save_folder = str(value.get("run_folder")), str(value.get("save_folder"))
    if _of_run_folder(path) and save_folder.startswith(f"{run_folder}/"):
        value["save_folder"] = "{run_folder}" + save_folder.removeprefix(run_folder)
    return value


def _of_run_folder(path: str) -> bool:
    """Whether a config file is what a run wrote in its folder."""
    file = Path(path).expanduser()
    return file.name == RUN_CONFIG and (file.parent / RUN_RECORD).is_file()


def _refuse_moved(config: Config, source: str) -> None:
    """Raises if ``source``, which set ``run_folder``, is the config of a run folder that is elsewhere by now.

    Training would start again in the old place instead of resuming the run that the file belongs to.
    """
    if _of_run_folder(source):
        here = Path(source).expanduser().parent
        if Path(config.run_folder).resolve() != here.resolve():
            raise UserError(
                f"{source} belongs to a run, but its run_folder is {config.run_folder}: the run was moved or copied, or "
                f"was started from another folder; add run_folder={here} to resume it"
            )


def _merge_all(files: list[str], overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """All sources merged, and where each key was last set."""
    config: DictConfig = OmegaConf.structured(Config)
    origin: dict[str, str] = {}
    sources = [(path, _following(path, read_file(path)), True) for path in files]
    for text in overrides:
        value, key = read_override(text)
        sources.append((f"override {text!r}", value, key in REPLACED))
    for source, value, replace in sources:
        _refuse_unknown(value, source)
        origin |= dict.fromkeys(_leaves(value), source)
        _merge(config, value, source, replace=replace)
    return config, origin


def _leaves(value: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key in ``value``, those of inner nodes too."""
    keys = []
    for key, child in value.items():
        keys.append(f"{prefix}{key}")
        if isinstance(child, dict):
            keys += _leaves(child, f"{prefix}{key}.")
    return keys


@contextlib.contextmanager
def _naming_the_source(origin: dict[str, str]) -> Iterator[None]:
    """Adds where a key was set to an error that begins with that key."""
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
    _refuse_moved(result, origin.get("run_folder", ""))
    return _follow(result)


def load_model_plan(files: list[str], overrides: list[str] | None = None) -> ModelPlan:
    """The model alone, from files that need not hold a complete run (``configs/model/355m.yaml configs/mohd/x2.yaml``).

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


def load_mohd(files: list[str], overrides: list[str] | None = None) -> MoHDSettings:
    """Only the MoHD settings, from files that need not hold a model (``configs/mohd/75.yaml``).

    Raises:
        UserError: as :func:`load_config`.
    """
    config, _ = _merge_all(files, overrides or [])
    try:
        return typing.cast("MoHDSettings", OmegaConf.to_object(config.mohd))
    except OmegaConfBaseException as error:
        raise UserError(f"config: {first_line(error)}") from None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal one.

    A ``save_folder`` inside ``run_folder`` is written relative to it, so that it follows when the run is moved.
    """
    if config.save_folder.startswith(f"{config.run_folder}/"):
        inside = config.save_folder.removeprefix(config.run_folder)
        config = dataclasses.replace(config, save_folder=f"{{run_folder}}{inside}")
    return OmegaConf.to_yaml(OmegaConf.structured(config))
