"""Keeps secrets out of what a run writes and logs. They belong in the environment, or in a file that their library
reads."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

from mohd_train.config.schema import Config

# Endings of keys such as api_key, aws_secret_access_key, hub_token
SECRET = re.compile(r"(key|secret|token|password|passwd|credentials?)$", re.IGNORECASE)
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
HIDDEN = "(hidden)"


def without_secrets(value: Any) -> Any:
    """``value`` with every string under a key such as ``api_key`` hidden, and whatever precedes ``@`` in a URL."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **without_secrets(dict(vars(value))))
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(child, str) and SECRET.search(str(key)) else without_secrets(child)
            for key, child in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(child) for child in value]
    return IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def shown(config: Config) -> Config:
    """The config as it may be written to files, checkpoints and loggers."""
    return cast(Config, without_secrets(config))
