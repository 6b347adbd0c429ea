"""Conversion between native checkpoints, Hugging Face folders, and ``LlamaForCausalLM``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mohd_train import checkpoint
from mohd_train.checkpoint import Checkpoint
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.hf.configuration import MoHDConfig
from mohd_train.hf.modeling import MoHDForCausalLM
from mohd_train.model.llama import Transformer
from mohd_train.utils.encoding import custom_code_refused

# Our name -> Hugging Face's LLaMA name; `{}` is the layer.
LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    **{f"blocks.{{}}.attention.{x}_proj.weight": f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"blocks.{{}}.ffn.{x}_proj.weight": f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
# Names that a plan and a LlamaConfig share
LLAMA_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rope_theta", "rms_norm_eps", "initializer_range",
)  # fmt: skip
_FROM_LLAMA = {theirs: ours for ours, theirs in LLAMA_NAMES.items()}


def renamed_weights(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """``state`` under other names, such as :data:`LLAMA_NAMES` gives. Raises UserError for a weight without one."""
    renamed = {}
    for key, value in state.items():
        layer = re.search(r"\.(\d+)\.", key)
        pattern = key.replace(f".{layer[1]}.", ".{}.", 1) if layer else key
        if pattern not in names:
            raise UserError(f"weight {key!r} has no counterpart in LLaMA; only dense LLaMA models convert")
        renamed[names[pattern].format(layer[1] if layer else "")] = value
    return renamed


def from_hf_llama(hf_model: LlamaForCausalLM, kernels: str = "auto") -> Transformer:
    """A dense :class:`Transformer` with the weights of a Hugging Face LLaMA, in its dtype; the logits are equal.

    Raises:
        UserError: a LLaMA with biases, scaled rotary embeddings, a sliding window or another activation, which this
            architecture lacks.
    """
    config = hf_model.config
    unlike = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "rope_scaling": getattr(config, "rope_scaling", None) or False,
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "sliding_window": getattr(config, "sliding_window", None) or False,
    }
    if any(unlike.values()):
        raise UserError(
            f"this LLaMA has {', '.join(f'{k}={v}' for k, v in unlike.items() if v)}, which the MoHD base model lacks"
        )
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in LLAMA_SIZES}
    sizes["head_dim"] = sizes["head_dim"] or config.hidden_size // config.num_attention_heads
    plan = ModelPlan(
        name="llama-dense", base_hidden_size=config.hidden_size, max_seq_len=config.max_position_embeddings, **sizes
    )
    state = {k: v for k, v in hf_model.state_dict().items() if not k.endswith("rotary_emb.inv_freq")}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # tied ones share it
    with torch.device("meta"):
        model = Transformer(plan, kernels)
    model.load_state_dict({k: v.detach().clone() for k, v in renamed_weights(state, _FROM_LLAMA).items()}, assign=True)
    return model


def llama_sizes(plan: ModelPlan) -> dict[str, Any]:
    """A plan's sizes as arguments of a ``LlamaConfig`` or a similar one; embedding and head are two matrices."""
    return {name: getattr(plan, name) for name in LLAMA_SIZES} | {
        "max_position_embeddings": plan.max_seq_len,
        "tie_word_embeddings": False,
    }


def to_hf_llama(model: Transformer | MoHDForCausalLM, **config: object) -> LlamaForCausalLM:
    """A Hugging Face LLaMA with the weights of a dense model of ours, in its dtype; the logits are equal.

    Raises:
        UserError: a model with MoHD components.
    """
    model = model.transformer if isinstance(model, MoHDForCausalLM) else model
    plan = model.plan
    if plan.routed:
        parts = "MoHD components" if plan.components else "a mixture of experts"
        raise UserError(f"{plan.name} has {parts}, which LlamaForCausalLM lacks; export it as MoHDForCausalLM instead")
    hf_config = LlamaConfig(**llama_sizes(plan), **config)
    hf_model: Any = LlamaForCausalLM(hf_config)
    hf_model = hf_model.to(next(model.parameters()).dtype)
    hf_model.load_state_dict(
        {k: v.detach().clone() for k, v in renamed_weights(model.state_dict(), LLAMA_NAMES).items()}
    )
    return hf_model.train(model.training)


def load_native(found: Checkpoint | str | Path, kernels: str = "auto") -> MoHDForCausalLM:
    """The model of a native checkpoint, in float32 and evaluation mode. Every parameter must be there, and no other.

    Raises:
        UserError: as :func:`mohd_train.checkpoint.open_native`, or parameters that are missing, unexpected or of another shape.
    """
    found = found if isinstance(found, Checkpoint) else checkpoint.open_native(found)
    assert found.plan is not None, "a native checkpoint"
    found.verify()
    with torch.device("meta"):
        model = MoHDForCausalLM(MoHDConfig.from_plan(found.plan, kernels=kernels))
    weights = {name: weight.float() for name, weight in found.tensors().items()}
    try:
        model.transformer.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{found.path} does not hold the parameters of {found.plan.name}: {reason}") from None
    return model.eval()


def load_model(found: Checkpoint | str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM, in evaluation mode, from a checkpoint of any kind; a Hugging Face folder may be of any architecture.

    Args:
        trust_remote_code: run the Python code that a Hugging Face folder may hold.

    Raises:
        UserError: as :func:`mohd_train.checkpoint.open`, or one that lacks weights.
    """
    found = found if isinstance(found, Checkpoint) else checkpoint.open(found)
    if found.is_native:
        return load_native(found)
    try:
        with custom_code_refused(found.path):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                found.path, torch_dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{found.path} can't be loaded as a causal LM: {str(error).splitlines()[0]}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{found.path} lacks {len(info['missing_keys'])} weights, {info['missing_keys'][0]} among them")
    return model.eval()
