"""``MoHDConfig``: a :class:`ModelPlan` as a Hugging Face configuration, under LLaMA's names where it has them."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError

# Plan field -> key in config.json, where LLaMA's name differs.
RENAMED = {
    "name": "mohd_name",
    "max_seq_len": "max_position_embeddings",
    "attention": "mohd_attention",
    "ffn": "mohd_ffn",
    "experts": "moe_experts",
}


# LLaMA 355M: what a configuration without arguments describes. Readings have the plan's own defaults.
DEFAULTS: dict[str, Any] = {
    "name": "355m-dense",
    "base_hidden_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 32,
    "vocab_size": 32000,
    "max_seq_len": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}


# Keys of other architectures' configurations that would change the function, with the one value that MoHD computes.
LLAMA_ONLY: dict[str, Any] = {
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
}


class MoHDConfig(PretrainedConfig):
    """Configuration of :class:`MoHDForCausalLM`: every field of a :class:`ModelPlan`, LLaMA 355M's by default.

    Args:
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``.
        kwargs: the plan's fields under their own names, but for :data:`RENAMED`, and what :class:`PretrainedConfig`
            takes. ``mohd_attention`` and ``mohd_ffn`` are ``{"sub_dims": N, "top_k": K, "shared": S, "width": d / N}``,
            or None for a dense component; ``moe_experts`` is the same for a mixture of experts, or None; ``hidden_size`` is this
            model's d, ``base_hidden_size`` d0; the readings are those of :class:`mohd_train.config.schema.MoHDSettings`.

    Raises:
        ValueError: a configuration that no model can be built from, or one of another architecture (scaled rotary embeddings,
            biases, another activation).
    """

    model_type = "mohd"
    keys_to_ignore_at_inference = ["past_key_values", "balance_loss"]

    def __init__(self, kernels: str = "auto", use_cache: bool = True, **kwargs: Any) -> None:
        self.kernels, self.use_cache = kernels, use_cache
        for field in dataclasses.fields(ModelPlan):
            key = RENAMED.get(field.name, field.name)
            setattr(self, key, kwargs.pop(key, DEFAULTS.get(field.name, field.default)))
        for key, only in LLAMA_ONLY.items():
            if (value := kwargs.pop(key, only)) not in (only, None):
                raise ValueError(f"{key} is {value!r}, which MoHD doesn't support: leave it out, or give {only!r}")
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        try:
            self.to_plan().check()
        except UserError as error:
            raise ValueError(f"no MoHD model has this configuration: {error}") from None

    @classmethod
    def from_plan(cls, plan: ModelPlan, **kwargs: Any) -> MoHDConfig:
        """The configuration of a plan; ``kwargs`` go to :class:`PretrainedConfig` (bos_token_id, ...)."""
        return cls(**{RENAMED.get(key, key): value for key, value in plan.to_dict().items()}, **kwargs)

    def to_plan(self) -> ModelPlan:
        """The inverse of :meth:`from_plan`."""
        return ModelPlan.from_dict(
            {field.name: getattr(self, RENAMED.get(field.name, field.name)) for field in dataclasses.fields(ModelPlan)}
        )


AutoConfig.register("mohd", MoHDConfig)
