"""Tables of an observation for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mohd_train.analysis.architecture import COMPONENT_POINTS
from mohd_train.analysis.figures import (
    NAMES,
    OF_A_DIM,
    PAPER_COMMON,
    PAPER_COMMON_SHARE,
    PAPER_CUMULATIVE,
    PAPER_MAP,
    PAPER_NARROWEST,
    independent_in,
)

MISSING = "–"
_SOUND = 1e-2  # a larger residual error is reported
_WORST = 5


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 0 else "right")
    return table


READING = (
    "how to read it: squares of Gaussian noise of 4096 dims put 71.6% into the top 1000 dims and 92.9% into the top half; the "
    "paper's LLaMA2-7B has 71.96% and 92.54%. So the paper's long tail is that of a Gaussian: only what lies beyond the Gaussian "
    "column says anything about the model"
)


def show_observation(console: Console, record: dict[str, Any], title: str) -> None:
    """Prints the key numbers next to those of Gaussian noise and the paper, then every layer."""
    m = OF_A_DIM[record["magnitude"]]
    console.print(_against_paper(record, title))
    console.print(READING, soft_wrap=True)
    if record["magnitude"] == "absolute":
        console.print("note: |x| is not the paper's magnitude, which is x²: its numbers are left out", soft_wrap=True)
    headers = ("att. in", "att. out", "FFN in", "FFN out", "att. %", "FFN %", "block %")
    table = _table(
        f"by layer: % of the sum of {m} that the top {record['top_dims']} dims hold; {m} of the outputs of attention, FFN and "
        "block in % of the block's input (geometric mean over tokens)",
        "layer",
        *headers,
    )
    for index, layer in enumerate(record["layers"]):
        held = [_percent(_times(layer["points"][point]["share_of_top_dims"])) for point in COMPONENT_POINTS]
        flow = layer["flow_percent_of_block_input_per_token"]
        table.add_row(
            str(index), *held, *(_percent(flow[point]) for point in ("attention_out", "ffn_out", "block_out"))
        )
    noise = _percent(_times(record["gaussian"]["share_of_top_dims"]))
    table.add_row("Gaussian", *(noise for _ in COMPONENT_POINTS), *(MISSING for _ in range(3)))
    console.print(table)
    unsound = [index for index, error in enumerate(record["residual_error"]) if error > _SOUND]
    if unsound:
        console.print(
            f"note: in layer(s) {', '.join(map(str, unsound))} the block's output is not its input plus its components' "
            f"outputs (off by up to {max(record['residual_error']):.1%}): norms or scales lie between, so a component's "
            "output here is not what reaches the residual stream",
            soft_wrap=True,
        )


def _times(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _against_paper(record: dict[str, Any], title: str) -> Table:
    width, layer, m = record["hidden_size"], record["layer"], OF_A_DIM[record["magnitude"]]
    noise, comparable = record["gaussian"], record["magnitude"] == "square"
    table = _table(
        f"{title}: {sum(record['tokens'].values()):,} tokens, layer {layer}, magnitude {m}",
        "attention input, %",
        title,
        "Gaussian noise",
        "paper (LLaMA2-7B)",
    )
    found = record["layers"][layer]["points"]["attention_in"]

    def add(name: str, value: float | None, gaussian: float | None, paper: str = MISSING) -> None:
        shown = [MISSING if each is None else f"{each:.2f}" for each in (value, gaussian)]
        table.add_row(name, *shown, paper)

    stated_top, stated_half = PAPER_CUMULATIVE.values()
    top, half = (f"{stated_top} (1000 of 4096)", f"{stated_half}") if comparable else (MISSING, MISSING)
    name = f"magnitude held by the top {record['top_dims']} of {width} dims"
    add(name, 100 * found["share_of_top_dims"], 100 * noise["share_of_top_dims"], top)
    add("magnitude held by 50% of the dims", 100 * found["share_of_half"], 100 * noise["share_of_half"], half)
    epsilon = f"{record['epsilon']:g}"
    add(f"sparsity (eq. 2): {m} below {epsilon}", _times(found["sparsity"]), _times(found["sparsity_gaussian"]))
    name = f"sparsity: {m} below {epsilon} of the token's mean"
    add(name, _times(found["sparsity_relative"]), _times(noise["sparsity_relative"]))
    activity = record["closely"]["attention_in"]["common_activity"]
    for row in activity:
        for n, paper in PAPER_COMMON.items():
            if str(n) in row["common"]:
                shown = f"{paper:.2f}" if row["share"] == PAPER_COMMON_SHARE else MISSING
                name = f"active in all of {n} tokens (top {row['share']:.0%})"
                add(name, 100 * row["common"][str(n)] / width, 100 * row["independent"][str(n)] / width, shown)
    share = record["closely"]["attention_in"]["map"]["share"]
    row = next(row for row in activity if row["share"] == share)
    if row["active_in"] is not None:
        tokens = len(row["active_in"]) - 1
        chance = independent_in(width, share, tokens)
        highly = f"highly active (top {share:.0%})"
        for n, per, name, stated in (
            (tokens, 1, f"{highly} in all of {tokens} tokens", PAPER_MAP[0]),
            (1, tokens, f"{highly} in one of {tokens} tokens only, for each", PAPER_MAP[1]),
        ):
            value, expected = (100 * dims[n] / (per * width) for dims in (row["active_in"], chance))
            add(name, value, expected, f"about {stated:.0f}" if tokens == 5 else MISSING)
    stated_flow = f"{PAPER_NARROWEST}" if comparable else MISSING
    for name, key in (("geometric mean over tokens", "_per_token"), ("ratio of means", "")):
        flows = [each[f"flow_percent_of_block_input{key}"]["attention_out"] for each in record["layers"]]
        narrowest = min((flow for flow in flows if flow is not None), default=None)
        add(f"attention output / block input, narrowest layer ({name})", narrowest, None, stated_flow)
    return table


def show_knockout(console: Console, record: dict[str, Any], title: str) -> None:
    """Prints correlations, and the sub-dimensions that matter most."""
    base = record["baseline"]["perplexity"]
    headers = ("intervention", "specialized", "Spearman", "Pearson", "within layers")
    table = _table(f"{title}: change in cross-entropy against routing share (perplexity {base:.3f})", *headers)
    for kind, found in record["correlation"].items():
        values = (found["all"]["spearman"], found["all"]["pearson"], found["within_layer"]["spearman"])
        shown = [MISSING if value is None else f"{value:+.2f}" for value in values]
        table.add_row(kind, str(found["all"]["n"]), *shown)
    console.print(table)
    tasks = list(record["baseline"]["tasks"])
    headers = ("sub-dimension", "intervention", "share", "perplexity", "change (nats)", *tasks)
    worst = _table(f"the {_WORST} interventions that change most", *headers)
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
