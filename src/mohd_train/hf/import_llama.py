"""Imports a Llama-shaped Hugging Face model as a native checkpoint to train on, dense or MoHD.

A MoHD of the same width (compression) keeps all weights, in another order of the hidden dims: the residual stream of a model
with RMSNorm may be permuted without changing its function, so the dims that matter most go into the shared sub-dimensions.
Routers start small (every active sub-dimension then weighs nearly 1), the group fusion as the identity: with all sub-dimensions
active the function is the dense model's. With fewer, what the inactive dims carried is missing until training has made up for it.

A wider MoHD (expansion, x2 to x4) computes the dense model's function whichever specialized sub-dimensions its routers pick.
The S shared ones hold the first dims, and each of the R = N - S specialized ones a copy of the rest, divided by sqrt(R): their
squares then add up to the dense model's, so that RMSNorm differs by the constant factor sqrt(expansion) alone, which its weights
and epsilon make up for. Group fusion writes what the one active copy computed into all copies. That takes K - S = 1, and K
sub-dimensions that are together as wide as the dense model, as in all of Table 3's expansions.
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
from mohd_train.config.plan import ModelPlan, SubDimPlan, make_plan
from mohd_train.config.schema import ModelConfig, MoHDSettings
from mohd_train.errors import UserError
from mohd_train.hf.convert import from_hf_llama, load_model
from mohd_train.model.init import initializer
from mohd_train.model.llama import Transformer
from mohd_train.model.mohd import GroupFusion, Router
from mohd_train.run_folder.paths import CHECKPOINTS, TOKENIZER
from mohd_train.utils.encoding import append_nothing, encode_text

CHECKPOINT, CONFIG = "ep0-ba0-rank0.pt", "model.yaml"
ROUTER_STD = 0.02  # std of a router's logits at the start: the scores of 16 sub-dimensions then differ by about 2%
CALIBRATION = 16, 512  # sequences, and tokens of each


def import_llama(
    source: str | Path, folder: Path, *, mohd: MoHDSettings | None = None, calibration: str | None = None
) -> Path:
    """Writes ``folder``: a native checkpoint, its tokenizer, and ``model.yaml`` to train it on with. Returns the checkpoint.

    Args:
        source: a Hugging Face folder. Tied embeddings come apart: this project's head is a parameter of its own.
        mohd: settings, of expansion 1 or :func:`as_mohd` says which; None: the dense model.
        calibration: text by which the hidden dims are ordered; None keeps their order.

    Raises:
        UserError: not Llama-shaped, settings that don't fit, text that is too short, or a folder that isn't empty.
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
    """A MoHD with a dense model's weights, its hidden dims in this order: the first go into the shared sub-dimensions.

    Raises:
        UserError: sub-dimensions that don't divide the hidden size, an expansion that can't hold the dense model's function, or a
            mixture of experts.
    """
    if settings.experts is not None:
        raise UserError(
            "mohd.experts: a mixture of experts has more intermediate dims than the dense model has weights for; import into the "
            "settings of configs/mohd, or train it from scratch"
        )
    base = dense.plan
    sizes = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(ModelConfig) if hasattr(base, field.name)
    }
    sizes["name"] = base.name.partition("-")[0]
    sizes["rms_norm_eps"] = (
        base.rms_norm_eps / settings.expansion
    )  # to match a mean square that is smaller by the same factor
    plan = make_plan(ModelConfig(**sizes), settings, base.max_seq_len)
    if plan.router_init_std is None:
        plan = dataclasses.replace(plan, router_init_std=ROUTER_STD)
    weights = dense.state_dict()
    if order_D is not None:
        weights = {name: _permuted(name, value, order_D) for name, value in weights.items()}
    if settings.expansion > 1:
        layout = _layout(plan)
        weights = {name: _expanded(name, value, plan, layout) for name, value in weights.items()}
    with torch.device("meta"):
        model = Transformer(plan)
    model.load_state_dict({name: value.float().clone() for name, value in weights.items()}, strict=False, assign=True)
    fill = initializer(model, plan, seed=0)
    for module in model.modules():
        if isinstance(module, Router | GroupFusion):  # everything that the dense model has no weights for
            fill(module.to_empty(device="cpu"))
    if settings.expansion > 1:
        _fuse_into_copies(model, layout)
    return model.eval()


def _layout(plan: ModelPlan) -> SubDimPlan:
    """The N, K and S that an expanded model's dims are laid out by.

    Raises:
        UserError: settings under which not every choice of sub-dimensions gives the dense model's function.
    """
    parts = {part for part in (plan.attention, plan.ffn) if part is not None}
    reason = None
    if not parts:
        reason = "no component has sub-dimensions"
    elif len(parts) > 1:
        reason = "attention and ffn differ in their sub-dimensions"
    else:
        (part,) = parts
        if part.top_k - part.shared != 1:
            reason = f"{part.top_k - part.shared} specialized sub-dimensions are active a token, where it takes 1"
        elif part.top_k * part.width != plan.base_hidden_size:
            reason = f"the active sub-dimensions are {part.top_k * part.width} dims, the source's are {plan.base_hidden_size}"
        elif plan.fusion == "none":
            reason = "fusion is none, and group fusion keeps the copies of a dim alike"
        else:
            return part
    raise UserError(
        f"mohd.expansion is {plan.hidden_size // plan.base_hidden_size}, but {reason}; configs/mohd/x2.yaml fits"
    )


def _expanded(name: str, weight: Tensor, plan: ModelPlan, layout: SubDimPlan) -> Tensor:
    """A dense weight over all D dims of an expanded model: the first S sub-dimensions, then R copies of the last."""
    copies, kept = layout.sub_dims - layout.shared, layout.shared * layout.width
    source_D = torch.cat([torch.arange(kept), torch.arange(kept, plan.base_hidden_size).repeat(copies)])
    dense_part = (".attention." in name and plan.attention is None) or (".ffn." in name and plan.ffn is None)
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    found = _permuted(name, weight, source_D)
    factors_D = torch.ones(plan.hidden_size, dtype=weight.dtype)
    if weight.dim() == 1:  # a norm: from the expanded stream to the dense model's normalized one
        factors_D /= (plan.hidden_size / plan.base_hidden_size) ** 0.5
        factors_D[kept:] *= copies**0.5
    elif name == "embedding.weight" or (writes and dense_part):
        factors_D[kept:] = copies**-0.5
    elif name == "head.weight" or dense_part:  # reads all copies
        factors_D[kept:] = 1 / copies
    return found * (factors_D[:, None] if writes else factors_D)


@torch.no_grad()
def _fuse_into_copies(model: Transformer, layout: SubDimPlan) -> None:
    """Group fusion: what one specialized sub-dimension computed goes into all of them."""
    for module in model.modules():
        if isinstance(module, GroupFusion) and module.mixing is not None:
            module.mixing[layout.shared :, layout.shared :] = (layout.sub_dims - layout.shared) ** -0.5


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
    model |= {"name": plan.name.partition("-")[0], "hidden_size": plan.base_hidden_size}
    found: dict[str, object] = {"model": model}
    if mohd is not None:
        found["mohd"] = {**dataclasses.asdict(mohd), "router_init_std": plan.router_init_std}
    return found
