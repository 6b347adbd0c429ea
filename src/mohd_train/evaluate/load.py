"""Loads a checkpoint for evaluation: the model, its tokenizer, and what identifies it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohd_train.checkpoint import Checkpoint, exists, resolve
from mohd_train.checkpoint.identity import check_tokenizer, read_tokenizer, tokenizer_sha256
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_model
from mohd_train.model.count import count
from mohd_train.run_folder.paths import LATEST, RECORD
from mohd_train.utils.text import plain_name


@dataclass
class LoadedModel:
    """A model on its device, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: dict[str, Any]  # goes into every result: name, checkpoint, kind, fingerprint, activated, total, ...
    vocab_size: int
    ours: bool  # trained by this framework: documents begin with BOS


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises UserError for a device that doesn't exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device!r} does not exist ({torch.cuda.device_count()} GPUs found); give --device cpu or another"
        )
    return chosen


def load(
    found: Checkpoint,
    *,
    tokenizer: Path | None = None,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Reads model and tokenizer.

    Args:
        tokenizer: a folder; default: the Hugging Face folder itself, or `RUN/tokenizer` of a native checkpoint.
        name: shown in tables; default: the plan's name (`355m-x2`), or the folder's.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        trust_remote_code: run the Python code that a Hugging Face folder may hold.

    Raises:
        UserError: the weights or the tokenizer cannot be read, or the tokenizer is not the one the model was trained with.
    """
    if name is not None:
        plain_name(name, "--name")  # results go into a folder of this name
    where = pick_device(device)
    folder = tokenizer or found.tokenizer_folder
    loaded_tokenizer = read_tokenizer(folder, "give the folder with --tokenizer", trust_remote_code=trust_remote_code)
    if found.plan is not None:  # refuse before reading gigabytes
        _check_tokenizer(found, loaded_tokenizer, folder, found.plan.vocab_size)
        name = name or _plan_name(found, found.plan)
    model = load_model(found, trust_remote_code=trust_remote_code)
    plan = model.config.to_plan() if hasattr(model.config, "to_plan") else None  # a MoHDConfig carries its plan
    name = name or (_plan_name(found, plan) if plan is not None else found.path.name)
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    model = model.to(where).eval()  # type: ignore[arg-type]
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if found.plan is None:
        _check_tokenizer(found, loaded_tokenizer, folder, vocabulary)
    activated, total = _count(model, plan)
    info = {
        "name": name,
        "checkpoint": found.source,
        "kind": "native" if found.is_native else "hf",
        "fingerprint": found.fingerprint,
        "activated": activated,
        "total": total,
        "plan": plan.to_dict() if plan is not None else None,
        "run": found.run_folder.name if found.is_native else None,
        **({"unfinished": unfinished} if (unfinished := _unfinished(found)) else {}),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": str(folder),
        "tokenizer_sha256": tokenizer_sha256(loaded_tokenizer),
    }
    return LoadedModel(model, loaded_tokenizer, info, vocabulary, ours=plan is not None)


def _plan_name(found: Checkpoint, plan: ModelPlan) -> str:
    return plain_name(plan.name, f"the model's name in {found.source} (--name gives it another)")


def _check_tokenizer(found: Checkpoint, tokenizer: PreTrainedTokenizerBase, folder: Path, vocabulary: int) -> None:
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer at {folder} has {len(tokenizer)} pieces, the model {vocabulary}; "
            "it is not the one that the model was trained with (--tokenizer)"
        )
    check_tokenizer(
        found.tokenizer_sha256,
        tokenizer,
        what=f"{folder} is another tokenizer than {found.source} was trained with",
        remedy="give the model's own with --tokenizer",
    )


def _unfinished(found: Checkpoint) -> str | None:
    """The progress of a native checkpoint's run, if it has not ended; None also if there is no record of a run."""
    record = found.run_folder / RECORD
    if not found.is_native or not record.is_file():
        return None
    try:
        run = json.loads(record.read_text(encoding="utf-8"))
        status, batch = str(run["status"]), run.get("batch", 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{record} is not the record of a run ({error}); restore it, or move the checkpoint away"
        ) from None
    if status != "finished":
        return f"{status}, batch {batch}"
    latest = found.path.parent / LATEST
    return f"{found.path.name}, not the last" if exists(latest) and resolve(latest) != found.path else None


def _count(model: PreTrainedModel, plan: ModelPlan | None) -> tuple[int, int]:
    """(activated, total) parameters as the paper counts them: weight matrices; activated ones without embedding and head.

    A tied matrix counts once.
    """
    if plan is not None:
        counts = count(plan)
        return counts.activated, counts.total
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    ends: dict[int, torch.Tensor] = {}
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(end, torch.nn.Module) and isinstance(end.weight, torch.Tensor):
            ends[id(end.weight)] = end.weight
    return total - sum(weight.numel() for weight in ends.values()), total
