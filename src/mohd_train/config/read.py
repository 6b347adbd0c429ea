"""One source of a config, a YAML file or a ``key=value`` argument, as nested plain data in which text stays text.

YAML would read the name ``1.10`` as the number 1.1, ``007`` as 7, ``1:30`` as 90 and ``on`` as true. The schema says which
keys hold text, so scalars at those keys are quoted before OmegaConf reads them. Null stays null.
"""

from __future__ import annotations

import io
import re
import sys
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mohd_train import resources
from mohd_train.config.keys import KNOWN_KEYS, is_mapping, is_number, is_text, item_type, schema_of
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.utils.text import first_line, nearest

_NULL, _TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
# What YAML 1.1 reads as a number in base 60 or 8; as text, OmegaConf refuses the first and reads the second in base 10.
_OLD_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*(:[0-9.]+)+|0[0-9_]+)")
_KEY_PART = re.compile(r"\[([^\]]*)\]|((?:\\.|[^.\[\\])+)")


def read_file(path: str) -> dict[str, Any]:
    """The content of a YAML file.

    Raises:
        UserError: no such file, not UTF-8, broken YAML (with the line), or not a mapping.
    """
    file = resources.find(Path(path).expanduser())
    if not file.is_file():
        raise UserError(
            f"{path}: no such config file{_packaged(path)}; give YAML files first, then key=value overrides"
        )
    try:
        content = file.read_text(encoding="utf-8")
        value = _load_with_text(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: broken YAML{where}: {getattr(error, 'problem', None) or first_line(error)}") from None
    except OSError as error:  # what OmegaConf raises for a document that is neither a mapping nor a list
        raise UserError(f"{path}: holds no mapping of keys to values ({first_line(error)})") from None
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no mapping of keys to values")
    return typing.cast("dict[str, Any]", value)


def _packaged(path: str) -> str:
    """The nearest file of the package to a missing ``configs/KIND/NAME.yaml``, as a hint."""
    configs = resources.path("configs")
    names = [f"configs/{file.relative_to(configs).as_posix()}" for file in sorted(configs.rglob("*.yaml"))]
    return nearest(path, names) if path.startswith("configs/") else ""


def read_override(text: str) -> tuple[dict[str, Any], str]:
    """``key=value`` as a nested mapping, and its dotted key.

    The value of a key that holds text is taken literally, unless it is ``null``, empty or quoted, as in YAML.

    Raises:
        UserError: it isn't of that form, or its value is broken YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text!r} is neither a YAML file nor an override; overrides look like key=value")
    parts = key_parts(key)
    _refuse_dotted_name(text, parts, value)
    annotation = KNOWN_KEYS.get(".".join(parts))
    if annotation is None and len(parts) > 1:  # an entry of a mapping
        annotation = item_type(KNOWN_KEYS.get(".".join(parts[:-1])))
    try:
        if is_text(annotation) and value.strip() and value.strip()[0] not in "\"'":
            if value.strip() not in ("null", "~"):
                value = _serialized(_quoted(value.strip()))
        else:
            value = with_text_quoted(value, annotation)
        nested = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {text!r}: {first_line(error)}") from None
    assert isinstance(nested, dict)
    return typing.cast("dict[str, Any]", nested), ".".join(parts)


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command line as (YAML files, key=value overrides).

    One with ``=`` is an override, unless there is a file of that name and no such key.

    Raises:
        UserError: it could be both.
    """
    files: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        key = word.partition("=")[0]
        known = ".".join(key_parts(key)[:1]) in KNOWN_KEYS
        is_file = "=" not in word or Path(word).expanduser().is_file()
        if is_file and "=" in word and known:
            raise UserError(
                f"{word!r} is a file here, and also sets the key {key}; write ./{word} for the file, or move it away"
            )
        if not is_file and not known and ("/" in key or word.endswith((".yaml", ".yml"))):
            raise UserError(f"{word}: no such config file, and no override: there is no key {key!r}")
        (files if is_file else overrides).append(word)
    return files, overrides


def key_parts(key: str) -> list[str]:
    """``["data", "domains", "v1.5"]`` of ``data.domains[v1.5]`` (OmegaConf's way to write a name with dots)."""
    return [bracketed or re.sub(r"\\(.)", r"\1", plain) for bracketed, plain in _KEY_PART.findall(key)]


def with_text_quoted(content: str, annotation: Any) -> str:
    """YAML in which everything that the schema takes as text is quoted.

    Args:
        annotation: the type of the content: a dataclass of the schema, or the type of a key's value.
    """
    node = yaml.compose(content, Loader=yaml.SafeLoader)
    if node is None:
        return content
    retyped = _retyped(node, annotation)
    return content if retyped is node else _serialized(retyped)


def _serialized(node: yaml.Node) -> str:
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=sys.maxsize))


def _load(content: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(content)), resolve=False)


def _load_with_text(content: str) -> Any:
    quoted = with_text_quoted(content, Config)
    try:
        return _load(quoted)
    except yaml.YAMLError:
        if quoted != content:
            _load(content)  # raises the error that names the line in the file
        raise


def _quoted(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(_TEXT, text, style='"')


def _retyped(node: yaml.Node, annotation: Any) -> yaml.Node:
    """``node`` itself if nothing in it changes; else a copy, since an alias may use the node at another key."""
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None and node.tag != _NULL
        as_text = is_text(annotation) or (is_number(annotation) and _OLD_NUMBER.fullmatch(node.value))
        return _quoted(node.value) if plain and as_text else node
    schema, item = schema_of(annotation), item_type(annotation)
    if isinstance(node, yaml.MappingNode) and (schema is not None or is_mapping(annotation)):
        hints = typing.get_type_hints(schema) if schema is not None else {}
        pairs = []
        for key, child in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                pairs.append((key, _retyped_merge(child, annotation)))
            else:
                named = key if schema is not None or not isinstance(key, yaml.ScalarNode) else _retyped_key(key)
                pairs.append((named, _retyped(child, hints.get(str(key.value)) if schema is not None else item)))
        same = all(new[0] is old[0] and new[1] is old[1] for new, old in zip(pairs, node.value, strict=True))
        return node if same else yaml.MappingNode(node.tag, pairs)
    if isinstance(node, yaml.SequenceNode) and item is not None and not is_mapping(annotation):
        children = [_retyped(child, item) for child in node.value]
        same = all(new is old for new, old in zip(children, node.value, strict=True))
        return node if same else yaml.SequenceNode(node.tag, children)
    return node


def _retyped_key(key: yaml.ScalarNode) -> yaml.ScalarNode:
    return _quoted(key.value) if key.style is None else key


def _retyped_merge(node: yaml.Node, annotation: Any) -> yaml.Node:
    """The value of ``<<``, a mapping or a list of them, which has the type of the mapping that it is merged into."""
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_retyped(child, annotation) for child in node.value])
    return _retyped(node, annotation)


def _refuse_dotted_name(text: str, parts: list[str], value: str) -> None:
    """Raises for ``data.domains.v1.5=0.9``: dots separate keys, and nothing lies below a domain."""
    for end in range(1, len(parts) - 1):
        key = ".".join(parts[:end])
        annotation = KNOWN_KEYS.get(key)
        if is_mapping(annotation) and is_number(annotation):
            name = ".".join(parts[end:])
            raise UserError(
                f"override {text!r}: dots separate keys, and {key} has no keys below its names; for the name {name!r} "
                f"write '{key}[{name}]={value}'"
            )
