"""What is there already, judged by the outputs themselves: a killed step leaves none that pass for whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mohd_train.config.schema import Config
from mohd_train.data import manifest as manifests
from mohd_train.data.verify import verify
from mohd_train.demo.corpus import read_corpus
from mohd_train.demo.tokenizer import VOCAB_SIZE
from mohd_train.demo.tokenizer import load_tokenizer as load_pieces
from mohd_train.errors import UserError

if TYPE_CHECKING:
    from mohd_train.evaluate.results import Result


def corpus(folder: Path) -> str | None:
    """The corpus, if each of its files is what its index says."""
    index = read_corpus(folder)
    if index is None:
        return None
    documents = sum(entry["documents"] for entry in index.values())
    return f"{documents} documents in {', '.join(index)}"


def tokenizer(model: Path) -> str | None:
    """The tokenizer, if it loads and has the size asked for."""
    try:
        pieces = load_pieces(model)
    except UserError:
        return None
    return f"{VOCAB_SIZE} pieces" if pieces.get_piece_size() == VOCAB_SIZE else None


def manifest(folder: Path) -> manifests.Manifest | None:
    """The manifest of prepared data, or None where preparation hasn't finished."""
    return manifests.load_manifest(folder) if (folder / manifests.MANIFEST).is_file() else None


def shards(folder: Path, tokenizer_source: str, seq_len: int) -> str | None:
    """The shards, if they are whole and of this tokenizer and length.

    Raises:
        UserError: they are of another tokenizer or length, or damaged; training would refuse them.
    """
    found = manifest(folder)
    if found is None:
        return None
    from mohd_train.checkpoint.identity import is_tokenizer
    from mohd_train.data.tokenizer import load_tokenizer  # seconds, for transformers

    if found.seq_len != seq_len or not is_tokenizer(found.tokenizer.sha256, load_tokenizer(tokenizer_source).hf):
        raise UserError(
            f"{folder} was prepared with another tokenizer or length than {tokenizer_source}, {seq_len}; remove it"
        )
    if problems := verify(folder):
        raise UserError(f"{problems[0]}; remove {folder} and run again")
    tokens = sum(splits["train"].tokens for splits in found.domains.values())
    return f"{tokens:,} tokens in {', '.join(sorted(found.domains))}"


def run(config: Config) -> str | None:
    """The trained model, if the run of this very config is finished and its last checkpoint is there."""
    from mohd_train.config.compare import config_differences
    from mohd_train.run_folder.record import read_record

    record = read_record(Path(config.run_folder))
    if record is None or record.data["status"] != "finished":
        return None
    if config_differences(record.data["config"], dataclasses.asdict(config)):
        return None  # train.py says what differs
    checkpoint = checkpoint_of(config.run_folder)
    return f"batch {record.data['batch']}, {checkpoint}" if checkpoint.exists() else None


def progress(folder: str) -> str | None:
    """How far an unfinished run came, for the heading."""
    try:
        record = json.loads((Path(folder) / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    batch = record.get("batch", 0)
    return f"from its checkpoint at batch {batch}" if batch and record.get("status") != "finished" else None


def checkpoint_of(folder: str) -> Path:
    """The link to a run's newest checkpoint."""
    return Path(folder) / "checkpoints" / "latest-rank0.pt"


def _stored(folder: Path, checkpoint: Path) -> dict[str, Result]:
    """Task -> result of the checkpoint. Those of a checkpoint that is gone are removed: nothing can be compared with them."""
    from mohd_train import checkpoint as checkpoints
    from mohd_train.evaluate import results

    if not checkpoint.exists():
        return {}
    fingerprint = checkpoints.open(checkpoint).fingerprint
    found = {path: results.read(path) for path in sorted(folder.glob("*.json")) if results.is_result(path)}
    for path, result in list(found.items()):
        if result.model["fingerprint"] != fingerprint:
            path.unlink()
            del found[path]
    return {result.settings.task: result for result in found.values()}


def evaluation(folder: Path, checkpoint: Path, limit: int | None) -> str | None:
    """The results in ``folder``, if every task's is there, of this checkpoint."""
    from mohd_train.evaluate.suite import load_suite

    stored = _stored(folder, checkpoint)
    whole = all(task in stored and stored[task].settings.limit == limit for task in load_suite().tasks)
    return f"{len(stored)} tasks" if whole else None


def answered(folder: Path, checkpoint: Path) -> str | None:
    """How many tasks an interrupted evaluation finished, for the heading."""
    stored = _stored(folder, checkpoint)
    return f"after {len(stored)} tasks" if stored else None
