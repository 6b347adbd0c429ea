"""Parameters and FLOPs of a plan, counted as the paper counts them and by part.

The paper's "# Activate" leaves out the embedding and the head, and counts bias-free linear weights only; its "# Params"
adds the untied embedding and head. Norms, routers and group fusion, in neither, have columns of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mohd_train.config.plan import ModelPlan, SubDimPlan


@dataclass(frozen=True)
class Counts:
    """Parameters by part; FLOPs of one token's forward pass.

    Attributes:
        activated: linear weights of the blocks that one token uses ("# Activate").
        total: all linear weights of the blocks, the embedding and the head ("# Params").
        flops_per_token: 2 per multiply-add: activated weights, head, routers, fusion of the active sub-dimensions, and
            causal attention at the mean context of ``seq_len`` (the embedding is a look-up).
    """

    activated: int
    total: int
    embedding: int
    head: int
    attention: int
    ffn: int
    norms: int
    router: int
    fusion: int
    flops_per_token: int
    seq_len: int

    @property
    def parameters(self) -> int:
        """Every parameter: the sum of the parts."""
        return self.total + self.norms + self.router + self.fusion

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def _active(weights: int, part: SubDimPlan | None) -> int:
    return weights if part is None else weights * part.top_k // part.sub_dims


def count(plan: ModelPlan, seq_len: int | None = None) -> Counts:
    """Counts from the plan alone; :func:`count_parameters` counts a model, and tests hold the two equal.

    Args:
        plan: the model.
        seq_len: sequence length for the attention FLOPs; default: the plan's.
    """
    d, layers, seq_len = plan.hidden_size, plan.num_hidden_layers, seq_len or plan.max_seq_len
    attention = layers * d * (2 * plan.query_width + 2 * plan.key_value_width)
    ffn = layers * 3 * d * plan.ffn_width
    embedding = head = plan.vocab_size * d
    activated = _active(attention, plan.attention) + _active(ffn, plan.ffn or plan.experts)
    fusion = fusion_active = 0
    for part in plan.components:
        if plan.fusion in ("grouped", "monarch"):
            fusion += layers * d * part.sub_dims
            fusion_active += layers * d * part.top_k
        if plan.fusion == "monarch":
            fusion += layers * d * part.width
            fusion_active += layers * part.top_k * part.width * part.width
    router = sum(layers * d * part.sub_dims for part in plan.components)
    if plan.experts is not None:  # shared experts have no score
        router += layers * d * (plan.experts.sub_dims - plan.experts.shared)
    scores = layers * plan.query_width * (seq_len + 1)  # q.k and p.v, each A multiply-adds for (seq_len + 1) / 2 keys
    return Counts(
        activated=activated,
        total=attention + ffn + embedding + head,
        embedding=embedding,
        head=head,
        attention=attention,
        ffn=ffn,
        norms=(2 * layers + 1) * d,
        router=router,
        fusion=fusion,
        flops_per_token=2 * (activated + head + router + fusion_active + scores),
        seq_len=seq_len,
    )


PARTS = {
    "embedding": ("embedding.",),
    "head": ("head.",),
    "router": (".router.",),
    "fusion": (".fusion.",),
    "norms": ("norm.",),
}


def count_parameters(plan: ModelPlan) -> dict[str, int]:
    """Parameters by part of the model itself, built on the meta device (seconds, no memory, whatever its size)."""
    import torch  # here: a table of counts needs no torch

    from mohd_train.model.llama import Transformer

    with torch.device("meta"):
        model = Transformer(plan)
    sizes = dict.fromkeys(("embedding", "head", "attention", "ffn", "norms", "router", "fusion"), 0)
    for name, parameter in model.named_parameters():
        part = next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), None)
        sizes[part or ("attention" if ".attention." in name else "ffn")] += parameter.numel()
    return sizes
