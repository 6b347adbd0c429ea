"""What the observation shows in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mohd_train.analysis.architecture import COMPONENT_POINTS
from mohd_train.analysis.figures import NAMES, PAPER_COMMON, PAPER_CUMULATIVE, PAPER_NARROWEST

MISSING = "–"
_SOUND = 1e-2  # residual error above which a reader is told
_WORST = 5


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    return table


def show_observation(console: Console, record: dict[str, Any], title: str) -> None:
    """The key numbers beside the paper's, then every layer."""
    console.print(_against_paper(record, title))
    heads = ("att. in", "att. out", "FFN in", "FFN out", "att. %", "FFN %", "block %")
    table = _table(
        "by layer: sparsity (1 - dims for 90% of the magnitude / D) of inputs and outputs; magnitude of the outputs of "
        "attention, FFN and block in percent of their own inputs",
        "layer",
        *heads,
    )
    for index, layer in enumerate(record["layers"]):
        sparsity = [layer["points"][point]["sparsity"] for point in COMPONENT_POINTS]
        own, block = layer["flow_percent_of_own_input"], layer["flow_percent_of_block_input"]
        flow = [own["attention"], own["ffn"], block["block_out"]]
        shown = [MISSING if value is None else f"{value:.3f}" for value in sparsity]
        table.add_row(str(index), *shown, *map(_percent, flow))
    console.print(table)
    unsound = [index for index, error in enumerate(record["residual_error"]) if error > _SOUND]
    if unsound:
        console.print(
            f"note: in layer(s) {', '.join(map(str, unsound))} the block's output is not its input plus its components' "
            f"outputs (off by up to {max(record['residual_error']):.1%}): norms or scales lie between, so a component's "
            "output here is not what reaches the residual stream",
            soft_wrap=True,
        )


def _against_paper(record: dict[str, Any], title: str) -> Table:
    width, layer = record["hidden_size"], record["layer"]
    table = _table(
        f"{title}: {sum(record['tokens'].values()):,} tokens, layer {layer}",
        "attention input",
        "%",
        "paper (LLaMA2-7B)",
    )
    found = record["layers"][layer]["points"]["attention_in"]
    top, half = PAPER_CUMULATIVE.values()
    held = 100 * found["share_of_top_dims"]
    table.add_row(
        f"magnitude held by the top {record['top_dims']} of {width} dims", f"{held:.2f}", f"{top} (1000 of 4096)"
    )
    table.add_row("magnitude held by 50% of the dims", f"{100 * found['share_of_half']:.2f}", f"{half}")
    for row in record["closely"]["attention_in"]["common_activity"]:
        for n, paper in PAPER_COMMON.items():
            if str(n) in row["common"]:
                name = f"active in all of {n} tokens (top {row['share']:.0%})"
                table.add_row(name, f"{100 * row['common'][str(n)] / width:.2f}", f"{paper:.2f}")
    flows = [each["flow_percent_of_own_input"]["attention"] for each in record["layers"]]
    narrowest = min((flow for flow in flows if flow is not None), default=None)
    table.add_row("attention output / input, narrowest layer", _percent(narrowest), f"{PAPER_NARROWEST}")
    found = record["closely"]["attention_in"]["map"]
    tokens = len(record["map_tokens"])
    in_all = 100 * found["active_in_all"] / width
    table.add_row(f"highly active in all {tokens} tokens of the map", f"{in_all:.2f}", f"about {100 * 400 / 4096:.0f}")
    return table


def show_knockout(console: Console, record: dict[str, Any], title: str) -> None:
    """Correlations, and the sub-dimensions that matter most."""
    base = record["baseline"]["perplexity"]
    heads = ("intervention", "specialized", "Spearman", "Pearson", "within layers")
    table = _table(f"{title}: change in cross-entropy against routing share (perplexity {base:.3f})", *heads)
    for kind, found in record["correlation"].items():
        values = (found["all"]["spearman"], found["all"]["pearson"], found["within_layer"]["spearman"])
        shown = [MISSING if value is None else f"{value:+.2f}" for value in values]
        table.add_row(kind, str(found["all"]["n"]), *shown)
    console.print(table)
    tasks = list(record["baseline"]["tasks"])
    heads = ("sub-dimension", "intervention", "share", "perplexity", "change (nats)", *tasks)
    worst = _table(f"the {_WORST} interventions that change most", *heads)
    for row in sorted(record["effects"], key=lambda row: -abs(row["delta_nll"]))[:_WORST]:
        stderr = "" if row["delta_nll_stderr"] is None else f" ± {row['delta_nll_stderr']:.4f}"
        worst.add_row(
            f"layer {row['layer']} {NAMES[row['component']]} {row['sub_dimension']}{' (shared)' if row['shared'] else ''}",
            row["kind"],
            f"{row['share']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['delta_nll']:+.4f}{stderr}",
            *(f"{100 * row['tasks'][task]['delta']:+.1f}" for task in tasks),
        )
    console.print(worst)
