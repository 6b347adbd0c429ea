"""What a folder of rows that eval/prefetch.py filled says of itself: `DIR/manifest.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.evaluate.text_file import write_text

FORMAT = "mohd_train.task_rows/1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One file, as the manifest keeps it. ``revision`` is the commit; ``conversion``: of the hub's Parquet copy."""

    task: str
    split: str
    rows: int
    sha256: str
    dataset: str
    config: str | None
    revision: str
    conversion: bool


@dataclass
class RowsManifest:
    """``files``: path under DIR -> entry; ``missing``: a place (``logiqa``, ``mmlu/astronomy``) -> why it could not be had."""

    files: dict[str, Entry]
    missing: dict[str, str]

    def save(self, folder: Path) -> None:
        """Writes `DIR/manifest.json`, whole or not at all."""
        about = {"format": FORMAT, "lm_eval": version("lm_eval"), "datasets": version("datasets")}
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        text = json.dumps({**about, "files": files, "missing": dict(sorted(self.missing.items()))}, indent=1)
        write_text(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> RowsManifest | None:
    """The manifest of a folder of rows; None where it has none (rows from elsewhere). Raises UserError for a broken one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        return RowsManifest({name: Entry(**entry) for name, entry in data["files"].items()}, dict(data["missing"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest of eval/prefetch.py ({error}); remove it and fetch again") from None


def why_missing(folder: Path, task: str) -> str | None:
    """Why a folder of rows has none of ``task``, where eval/prefetch.py could not have them; None where it says nothing of it."""
    known = None if (folder / task).is_dir() else read_manifest(folder)
    missing = known.missing if known else {}
    return next((why for place, why in missing.items() if place.partition("/")[0] == task), None)
