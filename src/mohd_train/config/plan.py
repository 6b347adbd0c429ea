"""The plan that a model is built from: the base model's sizes and the MoHD settings, checked and worked out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mohd_train.config.bounds import check_number, check_numbers
from mohd_train.config.schema import ModelConfig, MoHDSettings, SubDimensionConfig
from mohd_train.errors import UserError

# The values of each reading of the paper (docs/mohd.md), by its name in the plan and in the schema.
READINGS = {
    "init": ("normal", "torch"),
    "routing": ("learned", "random"),
    "router_input": ("normalized", "residual"),
    "scaling": ("sum_to_active", "sum_to_all", "subdims", "gate_mass", "none"),
    "fusion": ("grouped", "monarch", "none"),
    "balance_reduction": ("sum", "component_mean"),
    "balance_count": ("selected", "highest"),
    "balance_scores": ("specialized", "all"),
}
# Values that were renamed: configs, checkpoints and exports of earlier versions hold the old ones.
RENAMED_VALUES = {"mohd.scaling": {"sum_preserving": "sum_to_active"}}


def current_name(key: str, value: Any) -> Any:
    """The value of a config key, under today's name if it was renamed."""
    return RENAMED_VALUES[key].get(value, value) if key in RENAMED_VALUES else value


@dataclass(frozen=True)
class SubDimPlan:
    """Sub-dimensions of one component: dims ``i*width .. (i+1)*width-1`` are sub-dimension i of N = sub_dims.

    They are parts of the hidden size for MoHD; for a mixture of experts they are the experts, parts of the intermediate size.
    """

    sub_dims: int  # N
    top_k: int  # K, shared ones included
    shared: int  # S: sub-dimensions 0 .. S-1 are active for every token
    width: int  # c = d / N; of an expert F / K

    @property
    def specialized(self) -> int:
        """K - S: specialized sub-dimensions that a token chooses."""
        return self.top_k - self.shared

    @property
    def choices(self) -> int:
        """The number of ways in which a token can choose K - S of the N - S."""
        return math.comb(self.sub_dims - self.shared, self.top_k - self.shared)

    @property
    def has_choice(self) -> bool:
        """Whether the router chooses at all: some, but not all, of the N - S specialized ones are active."""
        return self.shared < self.top_k < self.sub_dims

    @property
    def group_fusion_dim(self) -> int:
        """Receptive field r of the group fusion (Table 3): N."""
        return self.sub_dims


@dataclass(frozen=True)
class ModelPlan:
    """Everything that decides a model's parameters and what it computes, with the schema's names and defaults."""

    name: str
    base_hidden_size: int  # d0
    hidden_size: int  # d
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # V
    max_seq_len: int
    rope_theta: float
    rms_norm_eps: float
    initializer_range: float
    init: str = ModelConfig.init
    attention: SubDimPlan | None = None  # None: dense
    ffn: SubDimPlan | None = None
    experts: SubDimPlan | None = None  # in place of ffn: a mixture of experts over N x F / K intermediate dims
    routing: str = MoHDSettings.routing
    router_input: str = MoHDSettings.router_input
    router_init_std: float | None = MoHDSettings.router_init_std
    scaling: str = MoHDSettings.scaling
    fusion: str = MoHDSettings.fusion
    gate_input: bool = MoHDSettings.gate_input
    balance_loss_weight: float = MoHDSettings.balance_loss_weight
    balance_reduction: str = MoHDSettings.balance_reduction
    balance_count: str = MoHDSettings.balance_count
    balance_scores: str = MoHDSettings.balance_scores

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", current_name("mohd.scaling", self.scaling))

    @property
    def query_width(self) -> int:
        """A: heads x head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def components(self) -> tuple[SubDimPlan, ...]:
        """The MoHD components of one layer."""
        return tuple(part for part in (self.attention, self.ffn) if part is not None)

    @property
    def routed(self) -> dict[str, SubDimPlan]:
        """The routed components of one layer by name: MoHD's, and a mixture of experts as ``ffn``."""
        parts = {"attention": self.attention, "ffn": self.ffn or self.experts}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def ffn_width(self) -> int:
        """Intermediate dims of one layer's FFN: F, or those of all experts, of which a token uses F."""
        return self.intermediate_size if self.experts is None else self.experts.sub_dims * self.experts.width

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints and ``run.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelPlan:
        """The inverse of :meth:`to_dict`. Raises :class:`UserError` where a key is missing or unknown."""
        values = dict(data)
        try:
            for part in ("attention", "ffn", "experts"):
                if values.get(part) is not None:
                    values[part] = SubDimPlan(**values[part])
            return cls(**values)
        except TypeError as error:
            raise UserError(
                f"this is not the plan of a MoHD model ({error}); it was written by another version"
            ) from None

    def check(self) -> ModelPlan:
        """This plan, which anyone may have written, if a model can be built from it.

        Raises:
            UserError: for what :func:`make_plan` refuses, and for sub-dimensions that don't fit the hidden size.
        """
        for field in ("hidden_size", "base_hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "vocab_size", "max_seq_len"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{field} is {value!r}; it must be a whole number of 1 or more")
        _check_heads("", self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        for key, known in READINGS.items():
            check_choice(key, getattr(self, key), known)
        for part in ("attention", "ffn"):
            found = getattr(self, part)
            if found is not None:
                if found.sub_dims < 1:
                    raise UserError(f"{part}.sub_dims is {found.sub_dims}; it must be 1 or more")
                config = SubDimensionConfig(found.sub_dims, found.top_k, found.shared)
                if _component(part, config, self.hidden_size) != found:
                    raise UserError(
                        f"{part}.width is {found.width}; it must be hidden_size / sub_dims = {self.hidden_size // found.sub_dims}"
                    )
        if (experts := self.experts) is not None:
            numbers = (experts.sub_dims, experts.top_k, experts.shared)
            if _experts("experts", *numbers, self.intermediate_size) != experts:
                raise UserError(
                    f"experts.width is {experts.width}; it must be intermediate_size / top_k = "
                    f"{self.intermediate_size // experts.top_k}"
                )
        _check_experts("", self.experts, self.ffn, self.gate_input)
        return self

    def differences(self, other: ModelPlan) -> list[str]:
        """``["hidden_size: 1024 here, 2048 there", ...]``: why weights of one plan can't be loaded into the other.

        The context length is no reason, as rotary embeddings hold no weights.
        """
        ours, theirs = self.to_dict(), other.to_dict()
        return [
            f"{key}: {ours[key]} here, {theirs[key]} there"
            for key in ours
            if key not in ("name", "max_seq_len") and ours[key] != theirs[key]
        ]


_PLAN_FIELDS = {field.name for field in dataclasses.fields(ModelPlan)}


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises :class:`UserError` if ``value`` is none of those that are known for ``key``."""
    if value not in known:
        raise UserError(f"{key} is {value!r}; it must be one of {', '.join(known)}")


def _component(section: str, config: SubDimensionConfig | None, hidden_size: int) -> SubDimPlan | None:
    if config is None:
        return None
    n, k, s = config.sub_dims, config.top_k, config.shared_sub_dims
    if hidden_size % n:
        near = sorted((x for x in range(1, 513) if hidden_size % x == 0), key=lambda x: abs(x - n))[:3]
        raise UserError(
            f"{section}.sub_dims is {n}, which does not divide the hidden size {hidden_size} (mohd.expansion x "
            f"model.hidden_size); nearest that do: {', '.join(map(str, sorted(near)))}"
        )
    if not 1 <= k <= n:
        raise UserError(f"{section}.top_k is {k}; it must lie in 1 .. {section}.sub_dims = {n}")
    if not 0 <= s <= k:
        raise UserError(
            f"{section}.shared_sub_dims is {s}; it must lie in 0 .. {section}.top_k = {k}, since shared ones are always active"
        )
    return SubDimPlan(sub_dims=n, top_k=k, shared=s, width=hidden_size // n)


def _experts(section: str, experts: int, top_k: int, shared: int, intermediate_size: int) -> SubDimPlan:
    if not 1 <= top_k <= experts:
        raise UserError(f"{section}.top_k is {top_k}; it must lie in 1 .. {section}.num_experts = {experts}")
    if not 0 <= shared < top_k:
        raise UserError(
            f"{section}.shared_experts is {shared}; it must lie in 0 .. {section}.top_k - 1 = {top_k - 1}, so that the router "
            "chooses at least one"
        )
    if intermediate_size % top_k:
        raise UserError(
            f"{section}.top_k is {top_k}, which does not divide model.intermediate_size = {intermediate_size}: an expert has "
            "intermediate_size / top_k dims, so that a token uses as many as the dense layer has"
        )
    return SubDimPlan(sub_dims=experts, top_k=top_k, shared=shared, width=intermediate_size // top_k)


def _check_experts(section: str, experts: SubDimPlan | None, ffn: SubDimPlan | None, gate_input: bool) -> None:
    if experts is None:
        return
    if ffn is not None:
        raise UserError(
            f"{section}experts and {section}ffn exclude each other: the feed-forward layer is one or the other"
        )
    if gate_input:
        raise UserError(f"{section}gate_input is for sub-dimensions: an expert reads all of x; set it to false")


def _check_heads(section: str, heads: int, key_value_heads: int, head_dim: int) -> None:
    if heads % key_value_heads:
        raise UserError(
            f"{section}num_attention_heads is {heads}, not a multiple of {section}num_key_value_heads = {key_value_heads}; each "
            "key/value head serves a whole number of query heads"
        )
    if head_dim % 2:
        raise UserError(f"{section}head_dim is {head_dim}; rotary embeddings need an even number")


def make_plan(model: ModelConfig, mohd: MoHDSettings, max_seq_len: int) -> ModelPlan:
    """Checks the base model and the MoHD settings against each other, and works out the numbers (Tables 1 and 3).

    Raises:
        UserError: an impossible combination; the message names the key and what would be possible.
    """
    check_numbers(model, "model")
    check_numbers(mohd, "mohd")
    check_number("max_seq_len", max_seq_len)
    sizes = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    _check_heads("model.", model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    readings = {
        field.name: getattr(mohd, field.name) for field in dataclasses.fields(mohd) if field.name in _PLAN_FIELDS
    }
    readings |= {"name": f"{model.name}-{mohd.name}", "scaling": current_name("mohd.scaling", mohd.scaling)}
    for key, known in READINGS.items():
        check_choice(f"model.{key}" if key == "init" else f"mohd.{key}", (sizes | readings)[key], known)
    hidden_size = mohd.expansion * model.hidden_size
    components = {part: _component(f"mohd.{part}", getattr(mohd, part), hidden_size) for part in ("attention", "ffn")}
    if (found := mohd.experts) is not None:
        numbers = (found.num_experts, found.top_k, found.shared_experts)
        components["experts"] = _experts("mohd.experts", *numbers, model.intermediate_size)
    _check_experts("mohd.", components.setdefault("experts", None), components["ffn"], mohd.gate_input)
    sizes |= {"base_hidden_size": model.hidden_size, "hidden_size": hidden_size, "max_seq_len": max_seq_len}
    return ModelPlan(**(sizes | readings | components))
