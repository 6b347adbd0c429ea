"""Every key of the schema with its type, so that a rule about all texts or all numbers can't miss one."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from mohd_train.config.schema import Config


def options(annotation: Any) -> tuple[Any, ...]:
    """``(X, Y)`` of ``Union[X, Y, None]``; ``(X,)`` of ``X`` and of ``Optional[X]``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(option for option in typing.get_args(annotation) if option is not type(None))
    return (annotation,)


def schema_of(annotation: Any) -> Any:
    """The dataclass inside ``X`` or ``Optional[X]``, or None."""
    return next((option for option in options(annotation) if dataclasses.is_dataclass(option)), None)


def all_keys(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its annotation."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        keys[name] = hints[field.name]
        nested = schema_of(hints[field.name])
        if nested is not None:
            keys |= all_keys(nested, f"{name}.")
    return keys


KNOWN_KEYS = all_keys(Config)


def is_text(annotation: Any) -> bool:
    """Whether a value of this type is always text."""
    return options(annotation) == (str,)


def is_mapping(annotation: Any) -> bool:
    """Whether it is ``dict[str, X]``: a mapping whose keys the user names."""
    return typing.get_origin(options(annotation)[0]) is dict


def item_type(annotation: Any) -> Any:
    """``X`` of ``list[X]`` and ``dict[str, X]``; None for what holds no items."""
    origin, arguments = typing.get_origin(options(annotation)[0]), typing.get_args(options(annotation)[0])
    return arguments[-1] if origin in (list, dict) else None


def is_number(annotation: Any) -> bool:
    """Whether a value of this type is, or holds, an int or a float."""
    item = item_type(annotation)
    return is_number(item) if item is not None else any(option in (int, float) for option in options(annotation))


NUMERIC_KEYS = tuple(key for key, annotation in KNOWN_KEYS.items() if is_number(annotation))
TEXT_KEYS = tuple(
    key for key, annotation in KNOWN_KEYS.items() if is_text(annotation) or is_text(item_type(annotation))
)


def value_of(config: Any, dotted: str) -> Any:
    """The value of a key; None if a section above it is null."""
    for part in dotted.split("."):
        config = getattr(config, part, None)
    return config


def items(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` for every entry of a key that holds a list or a mapping, for the key itself otherwise; none for null."""
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", child) for name, child in value.items())
    elif isinstance(value, list):
        yield from ((key, child) for child in value)
    elif value is not None:
        yield key, value
