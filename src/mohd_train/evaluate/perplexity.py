"""Validation perplexity of a checkpoint, per domain and in total, on prepared data.

The perplexity of a domain is exp of the mean negative log-likelihood over its predicted tokens (T - 1 of a sample of T);
that of the total weighs every token the same, so domains count by the size of their validation split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from mohd_train import checkpoint
from mohd_train.config.schema import DataConfig
from mohd_train.data.manifest import Manifest, load_manifest
from mohd_train.data.streaming import build_eval_loaders, check_data
from mohd_train.errors import UserError
from mohd_train.evaluate.load import LoadedModel, load
from mohd_train.evaluate.options import PerplexityOptions
from mohd_train.results.output import Output
from mohd_train.results.store import (
    KEY,
    PACKAGES,
    PERPLEXITY,
    PERPLEXITY_FORMAT,
    TOTAL,
    check_same_checkpoint,
    check_writable,
    rename_broken,
    write,
)
from mohd_train.utils.environment import hardware, now, versions
from mohd_train.utils.progress import Report, progress


@dataclass(frozen=True)
class Documents:
    """Each document of a split, in order: its predicted tokens and their summed negative log-likelihood, nats."""

    tokens: list[int]
    nll: list[float]


@dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood of one domain under a model."""

    tokens: int  # predicted
    nll: float  # summed, nats
    documents: Documents | None = None  # where it was asked for

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that does not fit a float."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


@torch.inference_mode()
def likelihood(model: nn.Module, batches: Any, eos_id: int | None = None) -> Likelihood:
    """Measures over batches of `{"input_ids": int64 [B,T]}`: each token after a sample's first is predicted from those before it.

    Args:
        eos_id: ends each document; given, losses are kept for each document too. The samples must be the split's, in order: a
            document runs on from one into the next.
    """
    device = next(model.parameters()).device
    tokens, ended = 0, 0
    document, nll = [], []  # of every predicted token
    for batch in batches:
        ids_BT = batch["input_ids"].to(device)
        logits_BTV = model(input_ids=ids_BT).logits
        for ids_T, logits_TV in zip(ids_BT, logits_BTV, strict=True):  # a sample at a time: float32 logits are large
            loss_T = nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
            if eos_id is None:
                nll.append(loss_T.double().sum(0, keepdim=True))
                continue
            nll.append(loss_T.double())
            ends_T = (ids_T == eos_id).cumsum(0) + ended
            document.append(ends_T[:-1])
            ended = int(ends_T[-1])
        tokens += ids_BT[:, 1:].numel()
    every = torch.cat(nll) if nll else torch.zeros(0, dtype=torch.float64)
    if not document:
        return Likelihood(tokens, float(every.sum()))
    index = torch.cat(document)
    sums = torch.zeros(int(index[-1]) + 1, dtype=torch.float64, device=device).index_add_(0, index, every)
    documents = Documents(torch.bincount(index).tolist(), sums.tolist())
    return Likelihood(tokens, float(every.sum()), documents)


def total(parts: dict[str, Likelihood]) -> Likelihood:
    """All domains as one, every token alike."""
    return Likelihood(sum(part.tokens for part in parts.values()), sum(part.nll for part in parts.values()))


def run_perplexity(options: PerplexityOptions, console: Console | None = None) -> int:
    """Measures, shows and stores `OUT/<model>/perplexity.json`. What is stored already is not computed again.

    Raises:
        UserError: data that isn't this model's (tokenizer, vocabulary, sequence length), a domain that it lacks, a
            checkpoint that can't be read, a stored result of another checkpoint or other data, a likelihood that isn't a
            number.
    """
    console = console or Console()
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; it must be 1 batch or more")
    found = checkpoint.open(options.checkpoint)
    manifest = load_manifest(options.data)
    loaded = load(found, name=options.name, **options.loading())
    data = _data_config(options, manifest, loaded)
    output = Output(options.output)
    path = output.folder / str(loaded.info["name"]) / PERPLEXITY
    output.fetch(path.parent.name)
    where = f"{output.where}/{path.parent.name}/{path.name}"
    settings = {
        "data": manifest.sha256(),
        "domains": sorted(data.domains),
        "limit": options.limit,
        "dtype": loaded.info["dtype"],
        # a limit counts batches, so their size decides which samples are measured
        **({"batch_size": options.batch_size} if options.limit is not None else {}),
    }
    parts = None if options.overwrite else _stored(path, settings, found.fingerprint, console)
    if parts is None:
        check_writable(path.parent)
        loaders = build_eval_loaders(data, manifest, device_batch_size=options.batch_size)
        parts = {
            name: _measure(name, loader, loaded.model, options.limit, console, manifest.tokenizer.eos_id)
            for name, loader in loaders.items()
        }
        _store(path, settings, loaded.info, parts, options.data, loaded.model.device)
        output.send(path)
    else:
        console.print(f"perplexity: reused from {where}", soft_wrap=True, highlight=False)
    console.print(f"{loaded.info['name']}: {loaded.info['checkpoint']}", soft_wrap=True, highlight=False)
    console.print(_table(parts))
    console.print(f"results: {where}", soft_wrap=True)
    return 0


def _data_config(options: PerplexityOptions, manifest: Manifest, loaded: LoadedModel) -> DataConfig:
    for domain in options.domains:
        if domain not in manifest.domains:
            raise UserError(f"{options.data} has no domain {domain!r}; it has {', '.join(sorted(manifest.domains))}")
    names = options.domains or sorted(manifest.domains)
    held = [name for name in names if "val" in manifest.domains[name] and manifest.samples(name, "val")]
    if not held:
        raise UserError(f"{options.data} has no validation samples in {', '.join(names)}; prepare it with --val-tokens")
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if longest is not None and manifest.seq_len > longest:
        raise UserError(f"{options.data} has samples of {manifest.seq_len} tokens, longer than the model's {longest}")
    data = DataConfig(local=str(options.data), domains=dict.fromkeys(held, 1.0), num_workers=0)
    check_data(
        data,
        vocab_size=loaded.vocab_size,
        seq_len=manifest.seq_len,
        tokenizer_sha256=loaded.info["tokenizer_sha256"],
    )
    return data


def _measure(
    name: str, loader: DataLoader[Any], model: nn.Module, limit: int | None, console: Console, eos_id: int
) -> Likelihood:
    batches = len(loader) if limit is None else min(limit, len(loader))
    counted = (batch for _, batch in zip(range(batches), loader, strict=False))
    with progress(console, name, batches) as report:
        found = likelihood(model, _reported(counted, batches, report), eos_id)
    if math.isnan(found.nll):
        raise UserError(
            f"{name}: the model's log-likelihood is not a number (NaN); its training diverged, or --dtype can't hold its "
            "activations (try --dtype float32)"
        )
    return found


def _reported(batches: Iterable[Any], total: int, report: Report) -> Iterator[Any]:
    for done, batch in enumerate(batches):
        report(done, total)
        yield batch


def _stored(path: Path, settings: dict[str, Any], fingerprint: str, console: Console) -> dict[str, Likelihood] | None:
    """The domains of the stored result if it is this same measurement; None if there is none that can be read."""
    if not path.exists():
        return None
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))[KEY]
        before, before_model = dict(ours["settings"]), {"checkpoint": "unknown"} | ours["model"]
        before_model["fingerprint"]
        parts = {name: Likelihood(entry["tokens"], entry["nll"]) for name, entry in ours["domains"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = rename_broken(path, f"{path} is not a perplexity result ({error})")
        console.print(said, markup=False, highlight=False, soft_wrap=True)
        return None
    check_same_checkpoint(path, before_model, fingerprint)
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        raise UserError(
            f"{path} was made with other {', '.join(differing)}; choose another --output or give --overwrite"
        )
    return parts


def _store(
    path: Path,
    settings: dict[str, Any],
    model: dict[str, Any],
    parts: dict[str, Likelihood],
    folder: Path,
    device: torch.device,
) -> None:
    every = {**parts, TOTAL: total(parts)}
    numbers: dict[str, Any] = {}
    for name, part in every.items():
        numbers[name] = {"tokens": part.tokens, "nll": part.nll, "loss": part.loss, "perplexity": part.perplexity}
        if part.documents is not None:  # for intervals over documents (mohd_train.study)
            numbers[name]["documents"] = asdict(part.documents)
    record = {
        "format": PERPLEXITY_FORMAT,
        "settings": settings,
        "model": model,
        "data": str(folder),
        TOTAL: numbers.pop(TOTAL),
        "domains": numbers,
        "versions": versions(PACKAGES),
        "hardware": hardware(device.type),
        "date": now(),
    }
    write(path, {KEY: record})


def _table(parts: dict[str, Likelihood]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("domain", "tokens", "loss", "perplexity"):
        table.add_column(header, justify="left" if header == "domain" else "right", no_wrap=True)
    for name, part in {**parts, TOTAL: total(parts)}.items():
        table.add_row(name, f"{part.tokens:,}", f"{part.loss:.4f}", f"{part.perplexity:,.2f}")
    return table
