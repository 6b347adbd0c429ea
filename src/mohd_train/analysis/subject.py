"""The model under study (one of our checkpoints, a Hugging Face folder, or a name on the hub), its tokenizer and identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mohd_train import checkpoint
from mohd_train.checkpoint.identity import check_tokenizer, tokenizer_sha256
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_model
from mohd_train.hf.modeling import MoHDForCausalLM
from mohd_train.model.llama import Transformer
from mohd_train.utils.encoding import custom_code_refused, open_tokenizer
from mohd_train.utils.text import first_line, plain_name

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_PROBED = 256  # numbers of each parameter that the fingerprint reads


@dataclass
class Subject:
    """A model on its device, in evaluation mode.

    Attributes:
        tokenizer: None if there is none; for a prepared data folder its hash is enough.
        tokenizer_sha256: None if nothing says which tokenizer the model was trained with.
        info: for the record: name, source, kind, fingerprint, architecture, dtype, plan (of our models).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_sha256: str | None
    info: dict[str, Any]

    @property
    def name(self) -> str:
        """For titles and file names."""
        return str(self.info["name"])

    @property
    def transformer(self) -> Transformer | None:
        """Our transformer, or None for another architecture."""
        return self.model.transformer if isinstance(self.model, MoHDForCausalLM) else None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Number of rows of the token embedding."""
        return self._embedding.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the token embedding: D."""
        return self._embedding.shape[1]

    @property
    def _embedding(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, if its configuration says so."""
        config = self.model.config
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def load_subject(
    source: str,
    *,
    tokenizer: Path | None = None,
    device: torch.device | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Subject:
    """Reads a model.

    Args:
        source: a checkpoint of any kind, local or on object storage, or a name on the hub.
        tokenizer: a folder; default: the run's for a checkpoint, else the model's own.
        dtype: of the weights: ``auto`` (as stored), float32, bfloat16 or float16. Statistics are in float32 or wider anyway.
        trust_remote_code: run the Python code that a Hugging Face folder may hold.
    Raises:
        UserError: the model, or the tokenizer that was asked for, can't be loaded.
    """
    opened = checkpoint.open(source) if checkpoint.exists(source) or source.endswith(".pt") else None
    model = (
        load_model(opened, trust_remote_code=trust_remote_code)
        if opened is not None
        else _from_hub(source, trust_remote_code)
    )
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    model = model.to(device or torch.device("cpu")).eval()  # type: ignore[arg-type]
    plan = model.config.to_plan() if isinstance(model, MoHDForCausalLM) else None
    info: dict[str, Any] = {
        "name": plain_name(plan.name, f"the model's name in {source}") if plan is not None else Path(source).name,
        "source": source,
        "kind": "native" if opened is not None and opened.is_native else "hf",
        "architecture": type(model).__name__,
        "fingerprint": fingerprint(model) if opened is None else opened.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": plan.to_dict() if plan is not None else None,
    }
    if opened is not None and opened.is_native:
        info["run"] = opened.metadata.get("run_name")
    sha256 = opened.tokenizer_sha256 if opened is not None else None
    place = tokenizer or (opened.tokenizer_folder if opened is not None else source)
    found = _tokenizer(tokenizer, place, trust_remote_code)
    if found is not None:
        check_tokenizer(
            sha256,
            found,
            what=f"{place} is another tokenizer than {source} was trained with",
            remedy="give the model's own with --tokenizer",
        )
        sha256 = sha256 or tokenizer_sha256(found)
    info["tokenizer_sha256"] = sha256
    return Subject(model, found, sha256, info)


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits over names, shapes and up to :data:`_PROBED` evenly spaced numbers of every parameter.

    Only for a model from the hub, which has no checkpoint whose every byte could be hashed, and to recognize records of
    earlier versions: a change between these numbers is not noticed.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[torch.tensor(probed(flat.numel()), dtype=torch.int64, device=flat.device)]
        digest.update(f"{name}:{tuple(parameter.shape)}".encode() + some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def probed(count: int) -> list[int]:
    """Up to :data:`_PROBED` evenly spaced indices in 0 .. count - 1, including the first and the last.

    In integers: float32 has no odd numbers beyond 2^24, and the last index would be past the end.
    """
    some = min(_PROBED, count)
    return [i * (count - 1) // max(1, some - 1) for i in range(some)]


def _from_hub(name: str, trust_remote_code: bool) -> PreTrainedModel:
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no model at {name}; give a checkpoint file, a Hugging Face folder, or a name on the hub")
    try:
        with custom_code_refused(name):
            return AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto", trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{name} is not a local file or folder, and can't be loaded from the hub: {first_line(error)}"
        ) from None


def _tokenizer(asked: Path | None, default: Path | str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    place = asked or default
    if Path(place).is_dir() and not any((Path(place) / name).is_file() for name in _TOKENIZER_FILES):
        if asked is None:
            return None  # corpus.py reports it if it is needed
        raise UserError(
            f"{asked} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); give another folder with --tokenizer"
        )
    try:
        return open_tokenizer(place, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if asked is None and not Path(place).is_dir():
            return None
        raise UserError(f"no tokenizer can be read from {place}: {' '.join(str(error).split())[:200]}") from None
