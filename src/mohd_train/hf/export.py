"""A native checkpoint as a Hugging Face folder that a stranger can load: weights, code, tokenizer and model card."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohd_train import checkpoint
from mohd_train.checkpoint import Checkpoint
from mohd_train.checkpoint.identity import check_tokenizer, read_tokenizer, tokenizer_sha256
from mohd_train.errors import UserError
from mohd_train.hf import remote_code
from mohd_train.hf.convert import load_native, to_hf_llama
from mohd_train.hf.modeling import MoHDForCausalLM
from mohd_train.model.count import count
from mohd_train.model.mohd import SubDimensions
from mohd_train.run_folder.metrics import read_metrics
from mohd_train.run_folder.paths import METRICS, checkpoint_batch
from mohd_train.run_folder.record import RunRecord, read_record
from mohd_train.utils.encoding import append_nothing

LOSS = "metrics/eval/LanguageCrossEntropy"
CARD, TRAINING_CONFIG = "README.md", "training_config.yaml"
# The largest relative difference in norm between the two implementations' logits: sums in another order, in the weights' dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CITATION = """@article{mohd2024,
  title={Mixture of Hidden-Dimensions Transformer},
  author={Chen, Yilong and Shang, Junyuan and Zhang, Zhenyu and Sheng, Jiawei and Liu, Tingwen and Wang, Shuohuan
          and Sun, Yu and Wu, Hua and Wang, Haifeng},
  journal={arXiv preprint arXiv:2412.05644},
  year={2024}
}"""


def export(
    path: str | Path,
    folder: str | Path,
    *,
    llama: bool = False,
    dtype: str = "float32",
    check: bool = True,
    scores: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """Writes a native checkpoint as a Hugging Face folder: config, safetensors, generation config, the run's tokenizer, a model
    card, and the code that ``trust_remote_code=True`` loads it with.

    The config names the tokenizer (``tokenizer_sha256``), so that the folder is never used with another one.

    Args:
        path: a checkpoint file or sharded folder, a link to one, on object storage too (``s3://...``). Its tokenizer is read
            from ``tokenizer/`` beside the folder the checkpoint lies in.
        folder: where to write; it must not exist, or be empty. It appears complete or not at all.
        llama: as ``LlamaForCausalLM`` (a dense model only), which needs no code of this project's.
        dtype: of the weights: float32, bfloat16 or float16.
        check: load the folder in a process without this package, and compare its logits and choices.
        scores: for the model card, as shown: ``{"piqa, acc": "63.20%"}``.

    Raises:
        UserError: an unreadable checkpoint, no tokenizer or another than the model's, a folder that isn't empty, or one that
            doesn't give the checkpoint's logits.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another folder")
    found = checkpoint.open_native(path)
    native = load_native(found)
    nn.Module.to(native, getattr(torch, dtype))
    tokenizer = read_tokenizer(found.tokenizer_folder, "keep a checkpoint in its run folder, which has it")
    check_tokenizer(
        found.tokenizer_sha256,
        tokenizer,
        what=f"{found.tokenizer_folder} is another tokenizer than {found.source} was trained with",
        remedy="put the run's own tokenizer there",
    )
    append_nothing(tokenizer)  # EOS ends a training document; a prompt goes on
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.model_input_names = [
        "input_ids",
        "attention_mask",
    ]  # some return token_type_ids, which `generate` refuses
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # only these are saved
    tokenizer.model_max_length = native.transformer.plan.max_seq_len
    model: Any = to_hf_llama(native) if llama else native
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for target in (model.config, model.generation_config):
        for key, value in ids.items():
            setattr(target, key, value)
    model.config.tokenizer_sha256 = tokenizer_sha256(tokenizer)
    if not llama:
        model.config.auto_map = remote_code.AUTO_MAP
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        whole = Path(staging) / "whole"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / CARD).write_text(
            card(found, native, tokenizer, folder.name, llama=llama, dtype=dtype, scores=scores or {}), encoding="utf-8"
        )
        record = _record(found)
        if record is not None:
            text = yaml.safe_dump(record.data["config"], sort_keys=False)  # secrets are not in it
            (whole / TRAINING_CONFIG).write_text(text, encoding="utf-8")
        if not llama:
            remote_code.write(whole)
        if check:
            check_folders({whole: native})
        if folder.is_dir():
            folder.rmdir()
        os.replace(whole, folder)
    return model


# Loads the folder where mohd_train can't be imported
STRANGER = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mohd_train":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
data, *folders = sys.argv[1:]
asked, found = torch.load(data), []
for folder, ids in zip(folders, asked):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        found.append({"logits": model(ids).logits.float()})
        if hasattr(model, "transformer"):
            routing = model.transformer(ids).routing
            found[-1]["indices"] = [part.indices for layer in routing for part in layer if part is not None]
torch.save(found, data)
"""


@torch.no_grad()
def check_folders(exported: Mapping[Path, MoHDForCausalLM]) -> None:
    """Compares folders, loaded in a process where this package can't be imported, with the models they were written from.

    Raises:
        UserError: one doesn't load, or its logits or choices differ.
    """
    asked = []
    for native in exported.values():
        plan = native.transformer.plan
        shape = 2, min(64, plan.max_seq_len)
        asked.append(torch.randint(plan.vocab_size, shape, generator=torch.Generator().manual_seed(0)))
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "ids.pt"
        torch.save(asked, data)
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", STRANGER, str(data), *(str(folder.resolve()) for folder in exported)]
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"the exported folder can't be loaded without mohd_train ({last}); --no-check writes it anyway"
            )
        loaded = torch.load(data)
    for native, ids, got in zip(exported.values(), asked, loaded, strict=True):
        _compare(native, ids, got)


def _compare(native: MoHDForCausalLM, ids: Tensor, got: dict[str, Any]) -> None:
    parts = [part for part in native.modules() if isinstance(part, SubDimensions)]
    kernels = [part.kernels for part in parts]
    try:  # the same backend on both sides: another one's rounding may flip a choice that is nearly a tie
        for part in parts:
            part.kernels = "reference"
        out = native.transformer(ids)
    finally:
        for part, name in zip(parts, kernels, strict=True):
            part.kernels = name
    assert out.logits is not None
    want = out.logits.float()
    error = float((got["logits"] - want).norm() / want.norm())
    limit = TOLERANCE[next(native.parameters()).dtype]
    chosen: list[Tensor] = [part.indices for layer in out.routing for part in layer if part is not None]
    same = "indices" not in got or all(map(torch.equal, got["indices"], chosen))
    if not error <= limit or not same:
        raise UserError(
            f"the exported folder doesn't compute what the checkpoint does: logits differ by {error:.1e} (limit {limit:.0e}), "
            f"choices {'agree' if same else 'differ'}; --no-check writes it anyway"
        )


def card(
    found: Checkpoint,
    native: MoHDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    llama: bool,
    dtype: str,
    scores: Mapping[str, str],
) -> str:
    """A model card from the run's record: what the model is, how to load it, and what it was trained on."""
    plan, counts = native.transformer.plan, count(native.transformer.plan, native.transformer.plan.max_seq_len)
    record = _record(found)
    batch = checkpoint_batch(found.path.name)
    facts = [
        ("Model", plan.name),
        ("Hidden size", f"{plan.hidden_size} (base {plan.base_hidden_size}), {plan.num_hidden_layers} layers"),
        *(
            (part, "dense" if sub is None else f"{sub.top_k} of {sub.sub_dims} sub-dimensions a token, {sub.shared} shared")
            for part, sub in (("Attention", plan.attention), ("Feed-forward", plan.ffn))
            if part == "Attention" or plan.experts is None
        ),
        *(
            [("Feed-forward", f"mixture of experts: {experts.top_k} of {experts.sub_dims} a token, {experts.shared} shared")]
            if (experts := plan.experts) is not None
            else []
        ),
        ("Parameters", f"{counts.parameters:,}; a token activates {counts.activated:,} of those of the layers' projections"),
        ("Vocabulary, context", f"{plan.vocab_size:,} pieces, {plan.max_seq_len:,} tokens"),
        ("Weights", dtype),
        ("Run, batch", f"{found.metadata.get('run_name', 'unknown')}, {'unknown' if batch is None else batch}"),
    ]  # fmt: skip
    if record is not None:
        data = record.data
        config = data["config"]
        rows = _logged(record.folder / METRICS, batch)
        # As counted in training: the batch size may have changed between sessions
        tokens = next((int(row["tokens"]) for row in reversed(rows) if row["batch"] == batch), None)
        if tokens is None:
            tokens = (batch or 0) * config["global_train_batch_size"] * config["max_seq_len"]
        facts.append(("Trained on", f"{tokens:,} tokens" + (f", seed {data['seed']}" if "seed" in data else "")))
        mix = config["data"].get("domains") or {}
        facts.append(("Data", ", ".join(f"{key} {share:g}" for key, share in mix.items()) or "unknown"))
        loss = next((float(row[LOSS]) for row in reversed(rows) if LOSS in row), None)
        if loss is not None:
            facts.append(("Validation", f"{loss:.4f} nats a token, perplexity {math.exp(loss):.2f}"))
        code = data.get("code") or {}
        facts.append(("Code", f"mohd_train {code.get('version')}, commit {code.get('commit')}"))
        processes = (data.get("sessions") or [{}])[-1].get("hardware", {}).get("processes", 1)
        facts.append(
            ("Command", f"`composer -n {processes} -c mohd train {TRAINING_CONFIG}`, that file with your paths in it")
        )
    facts += scores.items()
    table = "\n".join(f"| {key} | {value} |" for key, value in facts)
    trust = "" if llama else ", trust_remote_code=True"
    kind = "LLaMA" if llama or not plan.components else "MoHD (Mixture of Hidden Dimensions)"
    if plan.experts is not None:
        kind = "mixture-of-experts LLaMA" if not plan.components else f"{kind} with a mixture of experts"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mohd]
---

# {name}

A {kind} language model, trained with mohd_train, an independent implementation of
[arXiv:2412.05644](https://arxiv.org/abs/2412.05644).

| | |
|---|---|
{table}

## Use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

    lm_eval --model hf --model_args pretrained={name}{trust.replace(", ", ",")} --tasks arc_easy

The code in this folder is a plain PyTorch implementation; mohd_train has faster kernels, and reads this folder too.

## Citation

```bibtex
{CITATION}
```
"""


def _record(found: Checkpoint) -> RunRecord | None:
    """The record of the checkpoint's run, if it is in its run folder."""
    record = read_record(found.path.parent.parent)
    return record if record is not None and record.data.get("run_name") == found.metadata.get("run_name") else None


def _logged(metrics: Path, batch: int | None) -> list[dict[str, Any]]:
    """What was logged at or before the checkpoint's batch."""
    rows = read_metrics(metrics) if metrics.is_file() else []
    return [row for row in rows if batch is None or row["batch"] <= batch]


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Uploads an exported folder to the Hugging Face hub, and returns its address.

    Raises:
        UserError: the hub refuses: no login, no permission, or no such name.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--push {repository}: {reason} (log in with `hf auth login`); {folder} is complete") from None
