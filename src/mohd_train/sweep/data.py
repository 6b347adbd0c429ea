"""The data of a sweep: prepared once, checked once, the same for all of its runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from mohd_train.config.schema import Config
from mohd_train.data.manifest import MANIFEST, Manifest, load_manifest
from mohd_train.data.raw import shares
from mohd_train.errors import UserError
from mohd_train.sweep.scale import SCALES


@dataclass(frozen=True)
class DataSource:
    """Where a sweep's data comes from: a prepared folder, or raw rows and a tokenizer.

    Attributes:
        folder: prepared data; None: ``SWEEP/data``, from ``raw``.
        raw: folder of raw rows, as ``mohd prepare`` takes it.
        tokenizer: the same program's ``--tokenizer``.
    """

    folder: str | None = None
    raw: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.folder and (self.raw or self.tokenizer):
            raise UserError("--data names prepared data, --raw and --tokenizer prepare it: give one or the other")
        if bool(self.raw) != bool(self.tokenizer):
            raise UserError("--raw and --tokenizer go together: raw rows are prepared with a tokenizer")

    @property
    def given(self) -> bool:
        """Whether the user named any data."""
        return bool(self.folder or self.raw)

    def place(self, sweep_folder: Path) -> Path:
        """The prepared folder."""
        return Path(self.folder) if self.folder else sweep_folder / "data"


def ensure_data(source: DataSource, sweep_folder: Path, *, seq_len: int, scale: str) -> Path:
    """The prepared folder, made from the raw rows if it isn't complete yet (an interrupted preparation continues).

    Raises:
        UserError: no data was named, or what preparation refuses.
    """
    place = source.place(sweep_folder)
    if source.raw is None:
        if not source.folder and not (place / MANIFEST).is_file():
            raise UserError(
                "which data? give --data DIR (prepared), or --raw DIR --tokenizer MODEL to prepare it once for all runs"
            )
        load_manifest(place)
        return place
    from mohd_train.data.prepare import (
        Request,
        prepare,
    )  # imports torch and tokenizers: only if there is something to prepare

    place.parent.mkdir(parents=True, exist_ok=True)
    assert source.tokenizer is not None
    prepare(Request(source.raw, str(place), source.tokenizer, seq_len=seq_len, val_tokens=SCALES[scale].val_tokens))
    return place


def data_overrides(folder: Path, config: Config, scale: str) -> tuple[str, ...]:
    """``key=value`` overrides that adapt a config to the prepared data: its folder and, except at the paper's scale, vocabulary
    and mix.

    Args:
        folder: prepared data.
        config: of any run of the sweep.

    Raises:
        UserError: the data lacks a domain of the recipe, and the scale is the paper's.
    """
    manifest = load_manifest(folder)
    overrides = [f"data.local={folder}"]
    missing = [name for name in config.data.domains if name not in (*manifest.domains, *config.data.optional_domains)]
    if not SCALES[scale].fits_data:
        if missing:
            raise UserError(
                f"{folder} lacks {', '.join(missing)} of the recipe's domains (it has {', '.join(sorted(manifest.domains))}); "
                "prepare them, or give another mix for all runs: 'data.domains={...}'"
            )
        return tuple(overrides)
    overrides.append(f"model.vocab_size={manifest.tokenizer.vocab_size}")
    if missing:
        overrides.append(f"data.domains={json.dumps(_mix(manifest))}")
        overrides.append("data.optional_domains=[]")
    return tuple(overrides)


def _mix(manifest: Manifest) -> dict[str, float]:
    """LLaMA-1's proportions of the domains in the data; a domain that LLaMA-1 lacks gets its share of the tokens."""
    tokens = {name: splits["train"].tokens for name, splits in manifest.domains.items() if splits["train"].samples}
    return {name: round(share, 4) for name, share in shares(sorted(tokens), tokens).items()}


def check_once(config: Config) -> None:
    """Checks sequence length, vocabulary, domains and the shards' sizes before the first job rather than in each of them.

    Raises:
        UserError: as training would.
    """
    from mohd_train.data.streaming import check_data

    data = dataclasses.replace(config.data, verify=False)  # each run still checks the hashes if its config says so
    check_data(data, vocab_size=config.model.vocab_size, seq_len=config.max_seq_len)
