"""The paper's own numbers (`eval/paper/results.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mohd_train import resources
from mohd_train.config.catalogue import agrees
from mohd_train.errors import UserError
from mohd_train.utils.text import first_line

DEFAULT_PAPER = resources.root() / "eval" / "paper" / "results.yaml"


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's Table 2; scores in percent, parameter counts as printed."""

    model: str
    base: str
    setting: str
    activated: str
    params: str
    scores: dict[str, float]
    average: float
    note: str = ""

    @property
    def name(self) -> str:
        """This project's name of the model: `355m-x2`, `1.13b-75`, `2.7b-dense`."""
        return f"{self.base.lower()}-{self.setting.rstrip('%')}"

    def has_counts(self, activated: int, total: int) -> bool:
        """Whether these parameter counts are this row's, to the digits that the paper prints."""
        return agrees(activated, self.activated) and agrees(total, self.params)

    @property
    def label(self) -> str:
        """`MoHD-710M (355M x2)`."""
        return f"{self.model} ({self.base} {self.setting})"


def load_numbers(path: Path = DEFAULT_PAPER) -> dict[str, Any]:
    """Everything in the file. Raises UserError if it is missing or broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: the paper's numbers can't be read ({first_line(error)})") from None


def load_paper(path: Path = DEFAULT_PAPER) -> dict[str, PaperRow]:
    """The rows of Table 2: name -> row, in the paper's order.

    Raises:
        UserError: the file is missing or malformed.
    """
    data = load_numbers(path)
    try:
        rows = [PaperRow(**{**entry, "setting": str(entry["setting"])}) for entry in data["table2_results"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: table2_results is missing or malformed ({' '.join(str(error).split())})") from None
    return {row.name: row for row in rows}


def oddities(numbers: dict[str, Any], table: int) -> list[str]:
    """Oddities of the paper's own Table ``table``, as notes."""
    return [f"The paper: {text}." for text in numbers["oddities"] if f"Table {table}" in text]
