"""Small plans for tests."""

from __future__ import annotations

from typing import Any

from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import ModelConfig, MoHDSettings, SubDimensionConfig

SETTINGS = {  # expansion, N, K, S: the shapes of Table 3
    "50": (1, 8, 4, 3),
    "75": (1, 16, 12, 9),
    "x2": (2, 8, 4, 3),
    "x4": (4, 16, 4, 3),
    "100": (1, 4, 4, 3),
    "specialized-only": (1, 8, 4, 0),
    "shared-only": (1, 8, 4, 4),
}


def small_plan(
    setting: str = "dense", max_seq_len: int = 64, model: dict[str, Any] | None = None, **mohd: Any
) -> ModelPlan:
    """A 2-layer model, 64 wide before expansion, with one of the settings above or ``dense``."""
    base = ModelConfig(
        name="small",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
    )
    for key, value in (model or {}).items():
        setattr(base, key, value)
    settings = MoHDSettings(name=setting)
    if setting != "dense":
        expansion, n, k, s = SETTINGS[setting]
        settings = MoHDSettings(
            name=setting, expansion=expansion, attention=SubDimensionConfig(n, k, s), ffn=SubDimensionConfig(n, k, s)
        )
    for key, value in mohd.items():
        setattr(settings, key, value)
    return make_plan(base, settings, max_seq_len)
