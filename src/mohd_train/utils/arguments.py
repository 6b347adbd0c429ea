"""Command lines: what every parser of this package has in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """argparse's, with paths as a shell would give them: it expands ``--out ~/x``, but not ``--out=~/x``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, lambda text: Path(text).expanduser())
