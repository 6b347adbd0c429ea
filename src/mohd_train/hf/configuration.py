"""``MoHDConfig``: a :class:`ModelPlan` as a Hugging Face configuration, under LLaMA's names where it has them."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from mohd_train.config.plan import ModelPlan

# Plan field -> key in config.json, where LLaMA's name differs.
RENAMED = {
    "name": "mohd_name",
    "max_seq_len": "max_position_embeddings",
    "attention": "mohd_attention",
    "ffn": "mohd_ffn",
}


class MoHDConfig(PretrainedConfig):
    """Configuration of :class:`MoHDForCausalLM`. The defaults are LLaMA 355M's.

    Args:
        base_hidden_size: hidden size d0 of the base model; ``hidden_size`` is this model's d.
        mohd_attention: ``{"sub_dims": N, "top_k": K, "shared": S, "width": d / N}``, or None for dense attention.
        mohd_ffn: the same for the FFN.
        scaling, fusion, gate_input, balance_loss_weight, balance_reduction, routing: see
            :class:`mohd_train.config.schema.MoHDSettings`.
        kernels: ``auto``, ``reference``, ``grouped`` or ``triton``.
    """

    model_type = "mohd"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        mohd_name: str = "355m-dense",
        base_hidden_size: int = 1024,
        hidden_size: int = 1024,
        intermediate_size: int = 2560,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 32,
        head_dim: int = 32,
        vocab_size: int = 32000,
        max_position_embeddings: int = 4096,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        mohd_attention: dict[str, int] | None = None,
        mohd_ffn: dict[str, int] | None = None,
        scaling: str = "sum_preserving",
        fusion: str = "grouped",
        gate_input: bool = False,
        balance_loss_weight: float = 0.01,
        balance_reduction: str = "sum",
        routing: str = "learned",
        kernels: str = "auto",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        values = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        for key, value in values.items():
            setattr(self, key, value)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

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
