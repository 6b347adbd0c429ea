"""The bytes of text in a validation split, so that losses can be compared across tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mohd_train.config.schema import DataConfig
from mohd_train.data.manifest import TOKENIZER_FOLDER, load_manifest
from mohd_train.data.streaming import build_eval_loaders
from mohd_train.utils.encoding import open_tokenizer

BATCH = 64  # samples


def bytes_per_token(folder: Path) -> dict[str, float]:
    """Domain -> UTF-8 bytes of its validation text over its tokens, BOS and EOS among them (they are predicted too).

    Counted by decoding the stored samples, so it is that of the very tokens on which losses are measured.

    Raises:
        UserError: no prepared data in ``folder``.
    """
    manifest = load_manifest(folder)
    tokenizer = open_tokenizer(folder / TOKENIZER_FOLDER)
    names = [name for name in sorted(manifest.domains) if manifest.samples(name, "val")]
    data = DataConfig(local=str(folder), domains=dict.fromkeys(names, 1.0), num_workers=0)
    found = {}
    for name, loader in build_eval_loaders(data, manifest, device_batch_size=BATCH).items():
        ids = np.concatenate([batch["input_ids"].flatten().numpy() for batch in loader])
        documents = np.split(ids, np.flatnonzero(ids == manifest.tokenizer.eos_id) + 1)
        texts = tokenizer.batch_decode(documents, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found[name] = sum(len(text.encode()) for text in texts) / len(ids)
    return found


def nats_per_byte(domains: dict[str, tuple[int, float]], per_token: dict[str, float]) -> float:
    """Summed loss over the bytes it was measured on.

    Args:
        domains: name -> predicted tokens, and their summed loss in nats.
        per_token: name -> bytes of a token, :func:`bytes_per_token`.
    """
    nll = sum(loss for _, loss in domains.values())
    return nll / sum(tokens * per_token[name] for name, (tokens, _) in domains.items())
