"""The text under study as token sequences of one length, domain by domain: the validation split of a prepared data folder, or
raw text and JSON lines tokenized with the model's own tokenizer.

Shapes: B sequences of T = ``seq_len`` tokens.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mohd_train.analysis.subject import Subject
from mohd_train.checkpoint.identity import check_tokenizer
from mohd_train.config.schema import DataConfig
from mohd_train.data.manifest import MANIFEST, TOKENIZER_FOLDER, load_manifest
from mohd_train.data.raw import SUFFIXES, Source, domain_of_file, parse_row, range_lines, unpacked_units
from mohd_train.data.streaming import build_eval_loaders
from mohd_train.data.verify import verify
from mohd_train.errors import UserError
from mohd_train.utils.encoding import encode_text

DEFAULT_SEQ_LEN = 1024  # of raw text, unless the model's own limit is lower
_ORDER_SEED = 0  # of the order in which a prepared domain's samples are read
_TEXT_BLOCK = 1 << 20  # characters of a text file tokenized at once

Sequences = Callable[[], Iterator[NDArray[np.int64]]]


@dataclass(frozen=True)
class Batch:
    """B sequences of one domain."""

    domain: str
    ids_BT: Tensor  # int64


@dataclass(frozen=True)
class Corpus:
    """Domains in order, each with a function that yields its sequences [T] from the beginning."""

    seq_len: int
    domains: dict[str, Sequences]
    info: dict[str, Any]

    def batches(self, tokens: int, batch_size: int) -> Iterator[Batch]:
        """About ``tokens`` tokens, an equal part from every domain that has enough, and at least one sequence from each.

        Raises:
            UserError: a domain has less text than one sequence.
        """
        wanted = max(len(self.domains), -(-tokens // self.seq_len))
        for index, (domain, sequences) in enumerate(self.domains.items()):
            part = wanted // len(self.domains) + (index < wanted % len(self.domains))
            some = islice(sequences(), part)
            empty = True
            while rows := list(islice(some, batch_size)):
                empty = False
                yield Batch(domain, torch.from_numpy(np.stack(rows)))
            if empty:
                raise UserError(
                    f"{self.info['path']}: domain {domain!r} has less text than one sequence of {self.seq_len} tokens; "
                    "lower --seq-len, or give more text"
                )

    def count_batches(self, tokens: int, batch_size: int) -> int:
        """How many batches :meth:`batches` yields if every domain has enough text, for a progress bar."""
        wanted = max(len(self.domains), -(-tokens // self.seq_len))
        parts = [wanted // len(self.domains) + (i < wanted % len(self.domains)) for i in range(len(self.domains))]
        return sum(-(-part // batch_size) for part in parts)


def open_corpus(path: Path, subject: Subject, seq_len: int | None = None) -> Corpus:
    """Opens a prepared data folder (with a manifest.json), or a file or folder of .txt, .jsonl, .jsonl.gz, .jsonl.zst.

    Raises:
        UserError: there is no data, it is of another tokenizer than the model's, or the sequence length is too large.
    """
    if not path.exists():
        raise UserError(f"no data at {path}; give a prepared data folder, or a file or folder of text or JSON lines")
    limit = subject.max_positions
    if seq_len is not None and limit is not None and seq_len > limit:
        raise UserError(f"--seq-len {seq_len} is longer than the model reads ({limit}); give {limit} or less")
    if (path / MANIFEST).is_file():
        return _prepared(path, subject, seq_len)
    return _raw(path, subject, seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN))


def _prepared(path: Path, subject: Subject, seq_len: int | None) -> Corpus:
    manifest = load_manifest(path)
    made_with = manifest.tokenizer
    if subject.tokenizer_sha256 is None:
        raise UserError(f"{subject.info['source']} does not name its tokenizer; give it with --tokenizer")
    what, remedy = (
        f"{path} was made with another tokenizer ({made_with.name}) than the model's",
        "give data prepared with the model's",
    )
    check_tokenizer(
        subject.tokenizer_sha256, made_with.sha256, what=what, remedy=remedy, folder=path / TOKENIZER_FOLDER
    )
    if made_with.vocab_size > subject.vocab_size:
        raise UserError(f"{what} ({made_with.vocab_size} tokens, not {subject.vocab_size}); {remedy}")
    length = seq_len or min(manifest.seq_len, subject.max_positions or manifest.seq_len)
    if length > manifest.seq_len:
        raise UserError(f"--seq-len {length}: {path} has samples of {manifest.seq_len} tokens; give that or less")
    names = [n for n in sorted(manifest.domains) if manifest.samples(n, "train") and manifest.samples(n, "val")]
    if not names:
        raise UserError(f"{path} has no validation samples; prepare it with more --val-tokens")
    if problems := verify(path, names, hashes=False):
        raise UserError(f"{problems[0]}; copy the shard again, or prepare the data again")
    config = DataConfig(local=str(path), domains=dict.fromkeys(names, 1.0), num_workers=0)
    loaders = build_eval_loaders(config, manifest, device_batch_size=1)

    def reader(name: str) -> Sequences:
        dataset: Any = loaders[name].dataset

        def sequences() -> Iterator[NDArray[np.int64]]:
            for index in np.random.default_rng(_ORDER_SEED).permutation(
                len(dataset)
            ):  # in stored order, the first samples would be from few documents
                tokens = np.asarray(dataset[int(index)]["tokens"], np.int64)
                for start in range(0, len(tokens) - length + 1, length):
                    yield tokens[start : start + length]

        return sequences

    info = {
        "path": str(path),
        "kind": "prepared, validation split",
        "manifest_sha256": manifest.sha256(),
        "tokenizer_sha256": made_with.sha256,
        "domains_without_samples": sorted(set(manifest.domains) - set(names)),
    }
    return Corpus(length, {name: reader(name) for name in names}, info)


def _raw(path: Path, subject: Subject, seq_len: int) -> Corpus:
    if subject.tokenizer is None:
        raise UserError(
            f"{subject.info['source']} comes with no tokenizer, which raw text needs; give it with --tokenizer"
        )
    tokenizer = _text_only(subject.tokenizer)
    files = _files(path)
    if not files:
        raise UserError(f"{path} holds no text (.txt, {', '.join(SUFFIXES)}), and no {MANIFEST} of prepared data")

    def reader(paths: list[Path]) -> Sequences:
        def sequences() -> Iterator[NDArray[np.int64]]:
            rest = np.empty(0, np.int64)
            for file in paths:
                for ids in _tokens(file, tokenizer, subject.vocab_size):
                    rest = np.concatenate([rest, ids])
                    whole = len(rest) // seq_len
                    yield from rest[: whole * seq_len].reshape(whole, seq_len)
                    rest = rest[whole * seq_len :]

        return sequences

    info: dict[str, Any] = {
        "path": str(path),
        "kind": "raw text",
        "files": {d: [str(f) for f in fs] for d, fs in files.items()},
    }
    info["tokenizer_sha256"] = subject.tokenizer_sha256
    return Corpus(seq_len, {domain: reader(paths) for domain, paths in files.items()}, info)


def _files(path: Path) -> dict[str, list[Path]]:
    """Text files by domain, which is a first-level folder or file. If a domain has ``*.val.*`` files, only those."""
    if path.is_file():
        return {domain_of_file(path.name.removesuffix(".txt")): [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if (
            file.is_file()
            and file.name.endswith((".txt", *SUFFIXES))
            and not any(p.startswith(".") for p in inside.parts)
        ):
            top = inside.parts[0] if len(inside.parts) > 1 else domain_of_file(file.name.removesuffix(".txt"))
            found.setdefault(top, []).append(file)
    return {
        domain: [file for file in files if ".val." in file.name] or files for domain, files in sorted(found.items())
    }


def _text_only(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that treats a spelled-out ``</s>`` as plain text, as data preparation does."""
    copy = deepcopy(tokenizer)
    copy.split_special_tokens = True
    if isinstance(copy, PreTrainedTokenizerFast):
        copy.backend_tokenizer.encode_special_tokens = True
    return copy


def _tokens(file: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[NDArray[np.int64]]:
    """Token ids, document by document: BOS (if it isn't EOS), the text, EOS, as in training."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    bos = [] if tokenizer.bos_token_id in (None, tokenizer.eos_token_id) else [tokenizer.bos_token_id]
    for first, last, text in _documents(file):
        ids = encode_text(tokenizer, text)
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"the tokenizer gives id {max(ids)}, the model has {vocab_size}; give the model's own with --tokenizer"
            )
        yield np.asarray([*(bos if first else []), *ids, *(eos if last else [])], np.int64)


def _documents(file: Path) -> Iterator[tuple[bool, bool, str]]:
    """(whether it begins a document, whether it ends one, text). A text file is one document, read in blocks of whole lines."""
    if file.suffix == ".txt":
        with open(file, encoding="utf-8", errors="strict") as lines:
            try:
                block, first = lines.readlines(_TEXT_BLOCK), True
                while block:
                    following = lines.readlines(_TEXT_BLOCK)
                    yield first, not following, "".join(block)
                    block, first = following, False
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 ({error.reason}); convert it") from None
        return
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            text, problem = parse_row(line)
            if text is None:
                raise UserError(f"{file}:{number}: {problem}; fix the row, or remove it")
            yield True, True, text


def _lines(file: Path) -> Iterator[bytes]:
    source = Source(file, file.name, "", "val", file.stat().st_size)
    if source.compression is None:
        yield from range_lines(file, 0, source.bytes)
        return
    for unit, _ in unpacked_units(source, _TEXT_BLOCK):
        yield from io.BytesIO(unit)
