"""A run's start from a pretrained model: a Llama-shaped Hugging Face model as a native checkpoint, dense or a MoHD as wide.

A MoHD of the same width keeps all weights, in another order of the hidden dims: the residual stream of a model with RMSNorm may
be permuted without changing its function, so the dims that matter most go into the shared sub-dimensions. Routers start small
(every active sub-dimension then weighs nearly 1), the group fusion as the identity: with all sub-dimensions active the function is
the dense model's. With fewer, what the inactive dims carried is missing until training has made up for it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import LlamaForCausalLM

from mohd_train import __version__
from mohd_train.checkpoint.identity import read_tokenizer, tokenizer_sha256
from mohd_train.checkpoint.read import METADATA, PREFIX
from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import ModelConfig, MoHDSettings
from mohd_train.errors import UserError
from mohd_train.hf.convert import from_hf_llama, load_model
from mohd_train.model.llama import Transformer
from mohd_train.run_folder.paths import CHECKPOINTS, TOKENIZER
from mohd_train.utils.encoding import append_nothing, encode_text

CHECKPOINT, CONFIG = "ep0-ba0-rank0.pt", "model.yaml"
ROUTER_STD = 0.02  # of a router's logits at the start: the scores of 16 sub-dimensions then differ by some 2%
CALIBRATION = 16, 512  # sequences, and tokens of each


def import_llama(
    source: str | Path, folder: Path, *, mohd: MoHDSettings | None = None, calibration: str | None = None
) -> Path:
    """Writes ``folder``: a native checkpoint, its tokenizer, and ``model.yaml`` to train it on with. Returns the checkpoint.

    Args:
        source: a Hugging Face folder. Tied embeddings come apart: this project's head is a parameter of its own.
        mohd: settings of expansion 1; None: the dense model.
        calibration: text by which the hidden dims are ordered; None keeps their order.

    Raises:
        UserError: not Llama-shaped, settings that don't fit, text that is too short, or a folder that holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another folder")
    loaded = load_model(source)
    tokenizer = read_tokenizer(Path(source), "an import needs the model's own tokenizer")
    append_nothing(tokenizer)
    if not isinstance(loaded, LlamaForCausalLM):
        raise UserError(f"{source} is {type(loaded).__name__}; only LlamaForCausalLM can be imported")
    model = from_hf_llama(loaded.float())
    if mohd is not None:
        order = None
        if calibration is not None:
            ids = torch.tensor(encode_text(tokenizer, calibration))
            sequences, length = CALIBRATION[0], min(CALIBRATION[1], model.plan.max_seq_len)
            if len(ids) < sequences * length:
                raise UserError(f"the calibration text has {len(ids)} tokens; give {sequences * length} or more")
            order = importance(model, ids[: sequences * length].view(sequences, length)).argsort(descending=True)
        model = as_mohd(model, mohd, order)
    plan = model.plan
    metadata = {
        "version": __version__,
        "run_name": f"imported from {Path(source).name}",
        "plan": plan.to_dict(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "seq_len": plan.max_seq_len,
    }
    state = {"model": {PREFIX + name: value for name, value in model.state_dict().items()}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        whole = Path(staging) / "whole"
        (whole / CHECKPOINTS).mkdir(parents=True)
        torch.save({"state": {**state, "callbacks": {METADATA: metadata}}, "rng": []}, whole / CHECKPOINTS / CHECKPOINT)
        tokenizer.save_pretrained(whole / TOKENIZER)
        (whole / CONFIG).write_text(yaml.safe_dump(_config(plan, mohd), sort_keys=False), encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        whole.rename(folder)
    return folder / CHECKPOINTS / CHECKPOINT


def as_mohd(dense: Transformer, settings: MoHDSettings, order_D: Tensor | None = None) -> Transformer:
    """A MoHD of the same width with a dense model's weights, its hidden dims in this order: the first go into the shared
    sub-dimensions.

    Raises:
        UserError: an expansion, or sub-dimensions that don't divide the hidden size.
    """
    if settings.expansion != 1:
        raise UserError(
            f"mohd.expansion is {settings.expansion}; a pretrained model's dims fill a MoHD of expansion 1 only"
        )
    base = dense.plan
    sizes = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(ModelConfig) if hasattr(base, field.name)
    }
    sizes["name"] = base.name.partition("-")[0]
    plan = make_plan(ModelConfig(**sizes), settings, base.max_seq_len)
    if plan.router_init_std is None:
        plan = dataclasses.replace(plan, router_init_std=ROUTER_STD)
    model = Transformer(plan, seed=0)
    weights = dense.state_dict()
    if order_D is not None:
        weights = {name: _permuted(name, value, order_D) for name, value in weights.items()}
    kept = {name: value for name, value in model.state_dict().items() if name not in weights}  # routers and fusion
    model.load_state_dict(weights | kept)
    return model.eval()


def _permuted(name: str, weight: Tensor, order_D: Tensor) -> Tensor:
    """The residual stream's dims of a weight in another order: rows of what writes it, columns of what reads it."""
    return (
        weight[order_D]
        if weight.dim() == 1 or name.endswith(("o_proj.weight", "down_proj.weight"))
        else weight[:, order_D]
    )


@torch.no_grad()
def importance(dense: Transformer, ids_BT: Tensor) -> Tensor:
    """How much each hidden dim contributes to what the components read: [D].

    Over components, of ``E[n_j^2] * sum_o W[o, j]^2`` over the tokens and the weights W that read the normalized stream n, each
    component's sum scaled to 1.
    """
    total_D = torch.zeros(dense.plan.hidden_size)
    hooks = []

    def watch(part: torch.nn.Module) -> None:
        squares_D = torch.stack([linear.weight.float().square().sum(0) for linear in part.up_projections]).sum(0)  # type: ignore[union-attr]

        def add(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found_D = arguments[0].float().square().mean((0, 1)) * squares_D
            total_D.add_(found_D / found_D.sum() * len(arguments[0]))

        hooks.append(part.register_forward_pre_hook(add))

    for block in dense.blocks:
        watch(block.attention)
        watch(block.ffn)
    try:
        for row_T in ids_BT:
            dense(row_T[None], logits=False)
    finally:
        for hook in hooks:
            hook.remove()
    return total_D


def _config(plan: ModelPlan, mohd: MoHDSettings | None) -> dict[str, object]:
    names = [field.name for field in dataclasses.fields(ModelConfig) if hasattr(plan, field.name)]
    model = {name: getattr(plan, name) for name in names}
    found: dict[str, object] = {"model": {**model, "name": plan.name.partition("-")[0]}}
    if mohd is not None:
        found["mohd"] = {**dataclasses.asdict(mohd), "router_init_std": plan.router_init_std}
    return found
