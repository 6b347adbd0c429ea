"""``--scale``: the same sweep on smaller models, each scale with a recipe and a vocabulary of its own.

Every ratio is kept exactly: d : A : kv width : F of the base, the expansion, and N, K, S of the settings. What is not kept:
head_dim (at most 32), the depth, the vocabulary (the data's), and with it the share of the embedding and the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from mohd_train.config.schema import ModelConfig
from mohd_train.errors import UserError

HEAD_DIM = 32


@dataclass(frozen=True)
class Scale:
    """How a scale changes the models and runs of a sweep.

    Attributes:
        name: the value of ``--scale``, and the prefix of its models' names.
        purpose: for ``--help``.
        narrower, shallower: divisors of every width, and of the depth.
        recipe: of ``configs/recipe``; None: the sweep file's.
        vocab_size: of the tokenizer it is meant for, unless the data has one; None: the model file's.
        processes: of a run.
        val_tokens: asked for when the sweep prepares its own data.
    """

    name: str
    purpose: str
    narrower: int = 1
    shallower: int = 1
    recipe: str | None = None
    vocab_size: int | None = None
    processes: int = 1
    val_tokens: int = 200_000

    @property
    def fits_data(self) -> bool:
        """Whether vocabulary and mix follow the data, and runs may share a device; the paper's are fixed."""
        return self.recipe is not None


SCALES = {
    scale.name: scale
    for scale in (
        Scale("paper", "the paper's models, 8 GPUs each", processes=8, val_tokens=2_000_000),
        Scale("tiny", "an eighth as wide, minutes on two cores", 8, 6, "tiny", 4096),
        # 355M: d0 128, A 128, F 320, 4 layers: 0.754M activated, 13 tokens for each of them (docs/study.md has the arithmetic)
        Scale("small", "as wide as tiny, trained for evidence: half an hour on one core", 8, 6, "small", 1024),
        # 355M: d0 256, A 256, F 640, 8 layers: 6.03M activated
        Scale("medium", "a quarter as wide, minutes on one GPU", 4, 3, "medium", 4096),
    )
}

PURPOSES = "; ".join(f"{scale.name}: {scale.purpose}" for scale in SCALES.values())


def _divided(model: ModelConfig, scale: Scale, key: str, value: int, by: int) -> int:
    if value % by:
        raise UserError(
            f"--scale {scale.name}: {key} of {model.name} is {value}, no multiple of {by}, so its ratios can't be kept"
        )
    return value // by


def scaled_model(model: ModelConfig, scale: Scale) -> dict[str, str | int]:
    """The keys of ``model`` that differ at this scale; none at the paper's.

    Raises:
        UserError: a width that does not divide.
    """
    if not scale.fits_data:
        return {}
    head_dim = min(model.head_dim, HEAD_DIM)

    def heads(count: int, key: str) -> int:
        return _divided(model, scale, key, count * model.head_dim, scale.narrower * head_dim)

    return {
        "name": f"{scale.name}-{model.name}",
        "hidden_size": _divided(model, scale, "hidden_size", model.hidden_size, scale.narrower),
        "intermediate_size": _divided(model, scale, "intermediate_size", model.intermediate_size, scale.narrower),
        "num_hidden_layers": max(1, model.num_hidden_layers // scale.shallower),
        "num_attention_heads": heads(model.num_attention_heads, "num_attention_heads * head_dim"),
        "num_key_value_heads": heads(model.num_key_value_heads, "num_key_value_heads * head_dim"),
        "head_dim": head_dim,
        "vocab_size": scale.vocab_size or model.vocab_size,
    }


def paper_name(model: str) -> str:
    """The paper's model that a run's model stands for: ``355m`` for ``small-355m``."""
    prefix, _, rest = model.partition("-")
    return rest if rest and prefix in SCALES else model
