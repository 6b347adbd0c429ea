"""Parameters and FLOPs of a plan, counted as the paper counts them and by part.

The paper's "# Activate" leaves out the embedding and the head, and counts bias-free linear weights only; its "# Params"
adds the untied embedding and head. Norms, routers and group fusion, in neither, have columns of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.table import Table

from mohd_train.config.catalogue import agrees
from mohd_train.config.plan import ModelPlan, SubDimPlan

COLUMNS = ("embedding", "head", "attention", "ffn", "norms", "router", "fusion")


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
    """Counts from the plan alone. :func:`count_parameters` counts a model that was built; tests compare the two.

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
    """Parameters by part of the model itself, built on the meta device (in seconds and without memory, whatever its size)."""
    import torch  # here, since all other counts need no torch

    from mohd_train.model.llama import Transformer

    with torch.device("meta"):
        model = Transformer(plan)
    sizes = dict.fromkeys(COLUMNS, 0)
    for name, parameter in model.named_parameters():
        part = next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), None)
        sizes[part or ("attention" if ".attention." in name else "ffn")] += parameter.numel()
    return sizes


def render_counts(rows: list[tuple[ModelPlan, Counts, dict[str, str] | None]]) -> Table:
    """A row for each model, with the paper's figures in brackets where it has them."""
    table = Table(title="Parameters (in brackets: the paper's figure)", title_justify="left")
    for heading in ("model", "activated", "total", *COLUMNS, "forward FLOPs/token"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for plan, counts, paper in rows:
        figures = paper or {}
        table.add_row(
            plan.name,
            _against(counts.activated, figures.get("activated")),
            _against(counts.total, figures.get("total")),
            *(_millions(getattr(counts, part)) for part in COLUMNS),
            f"{counts.flops_per_token / 1e6:,.0f}M at {counts.seq_len}",
        )
    table.caption = (
        "activated: linear weights of the blocks that one token uses, without embedding and head; total adds both. "
        "Norms, router and fusion are in neither, as in the paper."
    )
    return table


def _against(value: int, shown: str | None) -> str:
    if shown is None:
        return _millions(value)
    return f"{_millions(value)} [dim]({shown}{'' if agrees(value, shown) else ', DIFFERS'})[/dim]"


def _millions(value: int) -> str:
    return f"{value / 1e6:,.2f}M"
