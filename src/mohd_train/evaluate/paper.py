"""The paper's Table 2, read from `eval/paper/results.yaml`, and which of its rows a model of ours stands beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from mohd_train import resources
from mohd_train.config.catalogue import agrees
from mohd_train.errors import UserError

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
        """Whether a model of ``activated`` and ``total`` parameters is of this row's size, to the digits that are printed."""
        return agrees(activated, self.activated) and agrees(total, self.params)

    @property
    def label(self) -> str:
        """`MoHD-710M (355M x2)`."""
        return f"{self.model} ({self.base} {self.setting})"


def load_paper(path: Path = DEFAULT_PAPER) -> dict[str, PaperRow]:
    """Name -> row, in the paper's order.

    Raises:
        UserError: the file is missing or is not what this reads.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = [PaperRow(**{**entry, "setting": str(entry["setting"])}) for entry in data["table2_results"]]
    except FileNotFoundError:
        raise UserError(f"no file {path}; the paper's numbers are part of the repository") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold table2_results as it should ({' '.join(str(error).split())})") from None
    return {row.name: row for row in rows}
