"""``--scale tiny``: the same sweep on models an eighth as wide and a sixth as deep, with a recipe for two CPU cores.

Every ratio is kept exactly: d : A : kv width : F of the base, the expansion, and N, K, S of the settings. What is not kept:
head_dim (at most 32), the vocabulary (the data's), and with it the share of the embedding and the head.
"""

from __future__ import annotations

from mohd_train.config.schema import ModelConfig
from mohd_train.errors import UserError

SCALES = ("paper", "tiny")
TINY_RECIPE = "tiny"  # configs/recipe/tiny.yaml
NARROWER = 8
SHALLOWER = 6
HEAD_DIM = 32


def _divided(model: ModelConfig, key: str, value: int, by: int) -> int:
    if value % by:
        raise UserError(
            f"--scale tiny: {key} of {model.name} is {value}, no multiple of {by}, so its ratios can't be kept"
        )
    return value // by


def tiny_model(model: ModelConfig) -> dict[str, str | int]:
    """The keys of ``model`` that the tiny one has otherwise.

    Raises:
        UserError: a width that does not divide.
    """
    head_dim = min(model.head_dim, HEAD_DIM)

    def heads(count: int, key: str) -> int:
        return _divided(model, key, count * model.head_dim, NARROWER * head_dim)

    return {
        "name": f"tiny-{model.name}",
        "hidden_size": _divided(model, "hidden_size", model.hidden_size, NARROWER),
        "intermediate_size": _divided(model, "intermediate_size", model.intermediate_size, NARROWER),
        "num_hidden_layers": max(1, model.num_hidden_layers // SHALLOWER),
        "num_attention_heads": heads(model.num_attention_heads, "num_attention_heads * head_dim"),
        "num_key_value_heads": heads(model.num_key_value_heads, "num_key_value_heads * head_dim"),
        "head_dim": head_dim,
    }
