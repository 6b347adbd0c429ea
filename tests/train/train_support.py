"""Small prepared data and a small config, made in a moment; shared by the training tests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from streaming import MDSWriter

from mohd_train.config.load import load_config
from mohd_train.config.schema import Config
from mohd_train.data.manifest import HASH, Manifest, Split, TokenizerInfo, save_manifest
from mohd_train.data.verify import shard_from_index

ROOT = Path(__file__).resolve().parents[2]
VOCAB, SEQ_LEN = 64, 16

CONFIG = """
model: {{name: mini, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
         num_key_value_heads: 2, head_dim: 8, vocab_size: {vocab}}}
data: {{local: {data}, domains: {{cc: 3.0, wiki: 1.0}}, num_workers: 0}}
optimizer: {{lr: 3.0e-3}}
scheduler: {{t_warmup: 2ba}}
run_folder: {runs}/{{run_name}}
max_seq_len: {seq_len}
max_duration: 6ba
global_train_batch_size: 8
device_train_microbatch_size: 4
device_eval_batch_size: 4
eval_interval: 3ba
save_interval: 2ba
routing_log_interval: 2ba
precision: fp32
progress_bar: false
device: cpu
"""


def write_split(folder: Path, samples: int, rng: np.random.Generator, seq_len: int, vocab: int) -> Split:
    """One split of random walks over the vocabulary (something to learn: the next token is near the last)."""
    folder.mkdir(parents=True)
    columns = {"tokens": f"ndarray:uint16:{seq_len}"}
    with MDSWriter(out=str(folder), columns=columns, compression="zstd", hashes=[HASH], size_limit=1 << 11) as writer:
        for _ in range(samples):
            walk = rng.integers(vocab) + rng.integers(0, 3, seq_len).cumsum()
            writer.write({"tokens": (walk % vocab).astype(np.uint16)})
    shards = [shard_from_index(entry) for entry in json.loads((folder / "index.json").read_text())["shards"]]
    return Split(documents=samples, tokens=samples * seq_len, samples=samples, shards=shards)


def make_data(folder: Path, *, train: int = 60, val: int = 6, seq_len: int = SEQ_LEN, vocab: int = VOCAB) -> Path:
    """A prepared data folder with the domains cc and wiki."""
    rng = np.random.default_rng(0)
    domains = {
        name: {
            "train": write_split(folder / name / "train", train, rng, seq_len, vocab),
            "val": write_split(folder / name / "val", val + 2 * (name == "cc"), rng, seq_len, vocab),
        }
        for name in ("cc", "wiki")
    }
    (folder / "tokenizer").mkdir()
    text = json.dumps({"a tokenizer": "of the tests"})
    (folder / "tokenizer" / "tokenizer.json").write_text(text)
    files = {"tokenizer.json": hashlib.sha256(text.encode()).hexdigest()}
    tokenizer = TokenizerInfo(sha256="ab" * 32, vocab_size=vocab, bos_id=1, eos_id=2, name="test", files=files)
    save_manifest(Manifest(1, tokenizer, seq_len, "uint16", domains, bad_rows=0), folder)
    return folder


def make_config(folder: Path, data: Path, *overrides: str, mohd: str = "x2") -> Config:
    """The small config, with one of ``configs/mohd`` or ``configs/moe``, runs in ``folder/runs``."""
    file = write_config(folder, data)
    setting = ROOT / "configs" / ("moe" if mohd.startswith("moe") else "mohd") / f"{mohd}.yaml"
    return load_config([str(file), str(setting)], list(overrides))


def write_config(folder: Path, data: Path) -> Path:
    """The small config as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    whole = file.with_suffix(f".{os.getpid()}")  # several processes write the same
    whole.write_text(CONFIG.format(vocab=VOCAB, seq_len=SEQ_LEN, data=data, runs=folder / "runs"))
    return whole.replace(file)
