"""Between native checkpoints, Hugging Face folders, and ``LlamaForCausalLM``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.model.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Mapping

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
_FROM_LLAMA = {theirs: ours for ours, theirs in LLAMA_NAMES.items()}


def _rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
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
        UserError: a LLaMA with biases, scaled rotary embeddings or another activation, which this architecture lacks.
    """
    config = hf_model.config
    unlike = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "rope_scaling": getattr(config, "rope_scaling", None) or False,
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
    }
    if any(unlike.values()):
        raise UserError(
            f"this LLaMA has {', '.join(f'{k}={v}' for k, v in unlike.items() if v)}, which the MoHD base model lacks"
        )
    plan = ModelPlan(
        name="llama-dense",
        base_hidden_size=config.hidden_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_seq_len=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
    )
    state = {k: v for k, v in hf_model.state_dict().items() if not k.endswith("rotary_emb.inv_freq")}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # tied ones share it
    with torch.device("meta"):
        model = Transformer(plan, kernels)
    model.load_state_dict({k: v.detach().clone() for k, v in _rename(state, _FROM_LLAMA).items()}, assign=True)
    return model


def to_hf_llama(model: Transformer, **config: object) -> LlamaForCausalLM:
    """A Hugging Face LLaMA with the weights of a dense :class:`Transformer`, in its dtype; the logits are equal.

    Raises:
        UserError: a model with MoHD components.
    """
    plan = model.plan
    if plan.components:
        raise UserError(
            f"{plan.name} has MoHD components, which LlamaForCausalLM lacks; export it as MoHDForCausalLM instead"
        )
    hf_config = LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_hidden_layers,
        num_attention_heads=plan.num_attention_heads,
        num_key_value_heads=plan.num_key_value_heads,
        head_dim=plan.head_dim,
        max_position_embeddings=plan.max_seq_len,
        rope_theta=plan.rope_theta,
        rms_norm_eps=plan.rms_norm_eps,
        initializer_range=plan.initializer_range,
        tie_word_embeddings=False,
        **config,
    )
    hf_model = LlamaForCausalLM(hf_config).to(next(model.parameters()).dtype)
    hf_model.load_state_dict({k: v.detach().clone() for k, v in _rename(model.state_dict(), LLAMA_NAMES).items()})
    return hf_model.train(model.training)
