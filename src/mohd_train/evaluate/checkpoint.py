"""A checkpoint made ready for evaluation: model, tokenizer, and who it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_model
from mohd_train.model.count import count
from mohd_train.model.sharded import is_sharded
from mohd_train.storage import here, is_remote

_BLOCKS, _BLOCK = 64, 1 << 16  # of a fingerprint: blocks a file, bytes a block
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Location:
    """A checkpoint that was found on disk and not yet read."""

    path: Path
    kind: str  # "native" (Composer's) or "hf" (a Hugging Face folder)
    fingerprint: str
    source: str = ""  # its address, where it is a copy from object storage

    @property
    def run_folder(self) -> Path:
        """The run a native checkpoint belongs to: `RUN/checkpoints/CHECKPOINT`."""
        return self.path.parent.parent


@dataclass
class LoadedModel:
    """A model on its device, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: dict[str, Any]  # goes into every result: name, checkpoint, kind, fingerprint, activated, total, ...
    vocab_size: int
    ours: bool  # trained by this framework: a document begins with BOS


def locate(path: Path | str) -> Location:
    """Finds out what ``path`` is, and its fingerprint. A checkpoint on object storage (``s3://...``) is brought here.

    Raises:
        UserError: nothing is there, or it is neither a Composer checkpoint nor a Hugging Face folder.
    """
    source, path = str(path) if is_remote(path) else "", here(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}; give a Composer checkpoint (.pt) or a Hugging Face folder")
    path = path.resolve()  # `latest-rank0.pt` is a link: the result names what it stood for
    if is_sharded(path):
        kind, files = "native", sorted(path.glob("*.distcp"))
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is a folder without config.json; give a Hugging Face folder or a checkpoint file (.pt)"
            )
        kind, files = "hf", _hf_files(path)
    elif path.suffix == ".pt":
        kind, files = "native", [path]
    else:
        raise UserError(f"{path} is of no known kind; give a Composer checkpoint (.pt) or a Hugging Face folder")
    return Location(path, kind, fingerprint(files), source)


def _hf_files(path: Path) -> list[Path]:
    weights = sorted(file for suffix in ("safetensors", "bin") for file in path.glob(f"*.{suffix}"))
    if not weights:
        raise UserError(f"{path} has a config.json and no weights (*.safetensors or *.bin); the export is not complete")
    return [path / "config.json", *weights]


def fingerprint(files: list[Path]) -> str:
    """16 hex digits that tell checkpoints apart, wherever they lie and whatever their size.

    Of each file: its name, its size and 64 evenly spaced blocks of 64 KiB. Training changes weights everywhere, and the end
    of a `.pt` file holds the checksums of all its tensors.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{len(files) > 1 and file.name}:{size}".encode())  # a single file may be renamed
        with file.open("rb") as handle:
            for start in sorted({max(0, (size - _BLOCK) * i // (_BLOCKS - 1)) for i in range(_BLOCKS)}):
                handle.seek(start)
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()[:16]


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises :class:`UserError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device!r} is not there ({torch.cuda.device_count()} GPUs seen); give --device cpu or another"
        )
    return chosen


def load(
    location: Location,
    *,
    tokenizer: Path | None = None,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> LoadedModel:
    """Reads model and tokenizer.

    Args:
        tokenizer: a folder; default: the Hugging Face folder itself, or `RUN/tokenizer` of a native checkpoint.
        name: shown in tables; default: the plan's name (`355m-x2`), or the folder's.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.

    Raises:
        UserError: the weights or the tokenizer cannot be read, or do not belong together.
    """
    where = pick_device(device)
    model = load_model(location.path)
    plan = model.config.to_plan() if hasattr(model.config, "to_plan") else None  # a MoHDConfig carries its plan
    if dtype != "auto":
        model = model.to(_DTYPES[dtype])  # type: ignore[arg-type]
    model = model.to(where).eval()  # type: ignore[arg-type]
    default = location.run_folder / "tokenizer" if location.kind == "native" else location.path
    loaded_tokenizer = _load_tokenizer(tokenizer or default)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if len(loaded_tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer at {tokenizer or default} has {len(loaded_tokenizer)} pieces, the model {vocabulary}; "
            "it is not the one that the model was trained with (--tokenizer)"
        )
    activated, total = _count(model, plan)
    info = {
        "name": name or (plan.name if plan is not None else location.path.name),
        "checkpoint": location.source or str(location.path),
        "kind": location.kind,
        "fingerprint": location.fingerprint,
        "activated": activated,
        "total": total,
        "plan": plan.to_dict() if plan is not None else None,
        "run": location.run_folder.name if location.kind == "native" else None,
        **({"unfinished": unfinished} if (unfinished := _unfinished(location)) else {}),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": str(tokenizer or default),
    }
    return LoadedModel(model, loaded_tokenizer, info, vocabulary, ours=plan is not None)


def _unfinished(location: Location) -> str | None:
    """How far the run of a native checkpoint had come, if not to its end; None too where no record of a run is beside it."""
    record = location.run_folder / "run.json"
    if location.kind != "native" or not record.is_file():
        return None
    try:
        run = json.loads(record.read_text(encoding="utf-8"))
        status, batch = str(run["status"]), run.get("batch", 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{record} is no record of a run ({error}); restore it, or move the checkpoint away") from None
    if status != "finished":
        return f"{status}, batch {batch}"
    latest = location.path.parent / "latest-rank0.pt"
    return f"{location.path.name}, not the last" if latest.exists() and latest.resolve() != location.path else None


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    if not path.is_dir():
        raise UserError(f"no tokenizer at {path}; give the folder with --tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers and transformers each have exceptions of their own
        raise UserError(f"no tokenizer can be read from {path}: {' '.join(str(error).split())[:200]}") from error


def _count(model: PreTrainedModel, plan: ModelPlan | None) -> tuple[int, int]:
    """(activated, total) parameters as the paper counts them: weight matrices; activated ones less embedding and head.

    A matrix that is tied counts once.
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
