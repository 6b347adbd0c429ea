"""Figures of the observation study (Figs. 3-5 of the paper), drawn from its record. Hollow stars are the paper's own numbers, the
grey dotted line is Gaussian noise of the same width."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mohd_train.analysis.architecture import COMPONENT_POINTS, COMPONENTS
from mohd_train.analysis.plotting import (
    GAUSSIAN,
    PAPER,
    SHADES,
    finish,
    panels,
    percent_scale,
    save,
    style,
    whole_numbers,
)
from mohd_train.analysis.statistics import active_count

Record = dict[str, Any]

# Fig. 3 and 4 of arXiv:2412.05644, LLaMA2-7B (4096 dims): attention input of layer 16.
PAPER_CUMULATIVE = {100 * 1000 / 4096: 71.96, 50.0: 92.54}  # percent of the dims -> percent of the magnitude
PAPER_COMMON = {2: 100 * 2672 / 4096, 9: 100 * 673 / 4096}  # consecutive tokens -> percent of the dims
PAPER_COMMON_SHARE = 0.8  # of the dims that are active: the only interpretation of "top-20% threshold" with such counts
PAPER_NARROWEST = 6.7  # percent: attention's output of its input
PAPER_MAP = (
    100 * 400 / 4096,
    100 * 200 / 4096,
)  # percent of the dims: highly active in all of five tokens, for each in it only
GAUSSIAN_NAME = "Gaussian noise"

NAMES = {
    "block_in": "block input",
    "attention_in": "attention input",
    "attention_out": "attention output",
    "after_attention": "after attention",
    "ffn_in": "FFN input",
    "ffn_out": "FFN output",
    "block_out": "block output",
    "attention": "attention",
    "ffn": "FFN",
}
OF_A_DIM = {"square": "x²", "absolute": "|x|"}


def draw_observation(record: Record, title: str, folder: Path) -> list[Path]:
    """Draws all figures into ``folder``; returns the files.

    Args:
        record: of :func:`mohd_train.analysis.study.observe`.
        title: names the model.
    """
    draw = (_cumulative, _sparsity, _flow, _common, _map)
    return [path for each in draw for path in each(record, title, folder)]


def _cumulative(record: Record, title: str, folder: Path) -> list[Path]:
    figure, (axes, by_position) = panels(2)
    width, m = record["hidden_size"], OF_A_DIM[record["magnitude"]]
    share = 100 * np.arange(width + 1) / width
    for number, point in enumerate(COMPONENT_POINTS):
        curve = [0.0, *(100 * value for value in record["closely"][point]["curve"])]
        axes.plot(share, curve, label=NAMES[point], **style(number, max(1, width // 8)))
    noise = [0.0, *(100 * value for value in record["gaussian"]["curve"])]
    axes.plot(share, noise, label=GAUSSIAN_NAME, **GAUSSIAN)
    if record["magnitude"] == "square":
        axes.plot(
            [*PAPER_CUMULATIVE], [*PAPER_CUMULATIVE.values()], label="paper: LLaMA2-7B,\nattention input", **PAPER
        )
    top = 100 * record["top_dims"] / width
    axes.axvline(top, color="#888888", linewidth=0.8)
    axes.annotate(
        f"top {record['top_dims']} of {width} dims", (top, 3), fontsize=8, xytext=(4, 0), textcoords="offset points"
    )
    axes.legend(frameon=False, fontsize=8)
    finish(
        axes, f"{title}, layer {record['layer']}: held by the largest dims", "% of the dims",
        f"% of the sum of {m}",
    )  # fmt: skip
    for number, point in enumerate(COMPONENT_POINTS):
        values = record["closely"][point]["by_position"]["share_of_half"]
        shown = [np.nan if value is None else 100 * value for value in values]
        by_position.plot(shown, label=NAMES[point], **style(number, max(1, len(shown) // 8)))
    by_position.axhline(100 * record["gaussian"]["share_of_half"], label=GAUSSIAN_NAME, **GAUSSIAN)
    finish(
        by_position, "Held by 50% of the dims, by token position", "position in the sequence", f"% of the sum of {m}"
    )
    return save(figure, folder, "fig3a_cumulative_magnitude")


def _sparsity(record: Record, title: str, folder: Path) -> list[Path]:
    figure, axes = panels(3)
    m, epsilon = OF_A_DIM[record["magnitude"]], record["epsilon"]
    measures = (
        ("sparsity", f"share of {m} below {epsilon:g} (eq. 2)"),
        ("sparsity_relative", f"share of {m} below {epsilon:g} of the token's mean"),
        ("concentration", f"1 - dims for 90% of the sum of {m} / D"),
    )
    for axis, (measure, name) in zip(axes, measures, strict=True):
        for number, point in enumerate(COMPONENT_POINTS):
            look = style(number)
            axis.plot(_by_layer(record, point, measure), label=NAMES[point], **look)
            if measure == "sparsity":
                noise = _by_layer(record, point, "sparsity_gaussian")
                axis.plot(noise, **{**GAUSSIAN, "linewidth": 1.0, "color": look["color"]})
        if measure != "sparsity":
            axis.axhline(record["gaussian"][measure], label=GAUSSIAN_NAME, **GAUSSIAN)
        axis.set_ylim(0, 1)
        whole_numbers(axis)
        finish(axis, f"{title}: sparsity by layer", "layer", name)
    axes[0].plot([], label="thin: Gaussian noise of\nthe same mean square", **{**GAUSSIAN, "linewidth": 1.0})
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8)
    return save(figure, folder, "fig3b_sparsity_by_layer")


def _by_layer(record: Record, point: str, measure: str) -> list[float]:
    values = [layer["points"][point][measure] for layer in record["layers"]]
    return [np.nan if value is None else value for value in values]


def _flow(record: Record, title: str, folder: Path) -> list[Path]:
    figure, (block, own) = panels(2)
    m = OF_A_DIM[record["magnitude"]]
    of_block, of_own = "flow_percent_of_block_input", "flow_percent_of_own_input"
    for axes, name, points in (
        (block, of_block, ("attention_out", "after_attention", "ffn_out", "block_out")),
        (own, of_own, COMPONENTS),
    ):
        for number, point in enumerate(points):
            look = style(number)
            typical = [layer[f"{name}_per_token"][point] for layer in record["layers"]]
            axes.plot(_numbers(typical), label=NAMES[point], **look)
            of_means = [layer[name][point] for layer in record["layers"]]
            axes.plot(_numbers(of_means), color=look["color"], linewidth=0.7, linestyle=":")
        axes.plot([], color="#000000", linewidth=0.7, linestyle=":", label="thin: ratio of means\nover all tokens")
        percent_scale(axes)
        whole_numbers(axes)
    if record["magnitude"] == "square":
        narrowest = f"paper: attention at its\nnarrowest, {PAPER_NARROWEST}%"
        block.axhline(PAPER_NARROWEST, color="#888888", linewidth=0.8, label=narrowest)
    finish(block, f"{title}: activation flow (Fig. 4)", "layer", f"{m}, % of the block's input, a typical token")
    block.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper right")
    own.legend(frameon=False, fontsize=8)
    finish(own, "Output of a component against its normalized input", "layer", f"{m}, % of its input, a typical token")
    return save(figure, folder, "fig4_activation_flow")


def _numbers(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _common(record: Record, title: str, folder: Path) -> list[Path]:
    figure, (axes,) = panels(1, width=6.5, height=4.4)
    width = record["hidden_size"]
    found = record["closely"]["attention_in"]["common_by_threshold"]
    percent = [100 * share for share in found["shares"]]
    for number, n in enumerate(n for n in found["common"] if n != "1"):
        look = style(number, every=3)
        axes.plot(percent, [100 * dims / width for dims in found["common"][n]], label=f"n = {n}", **look)
        chance = [100 * dims / width for dims in found["independent"][n]]
        axes.plot(percent, chance, **{**GAUSSIAN, "color": look["color"], "linewidth": 0.9})
    axes.plot([], label="thin: Gaussian noise", **{**GAUSSIAN, "linewidth": 0.9})
    axes.plot([100 * PAPER_COMMON_SHARE] * 2, [*PAPER_COMMON.values()], label="paper: LLaMA2-7B, n = 2 and 9", **PAPER)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    name = f"{title}, layer {record['layer']}, attention input: dims active in all of n consecutive tokens"
    finish(axes, name, "threshold: % of a token's dims that count as active", f"% of the {width} dims")
    return save(figure, folder, "fig3c_common_activity")


def shown_token(text: str) -> str:
    """A token as a label: in quotes, since many begin with a space, and with line breaks and rare characters escaped."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x250 else c.encode("unicode_escape").decode() for c in text)
    return f'"{shown}"'


def independent_in(width: int, share: float, tokens: int) -> list[float]:
    """Number of dims active in exactly 0, 1, .. of ``tokens`` independent tokens: a binomial distribution."""
    p = active_count(share, width) / width
    return [width * math.comb(tokens, n) * p**n * (1 - p) ** (tokens - n) for n in range(tokens + 1)]


def _map(record: Record, title: str, folder: Path) -> list[Path]:
    found = record["closely"]["attention_in"]["map"]
    figure, (axes,) = panels(1, width=10.0, height=3.5)
    active = np.array(found["active"])
    relative = np.array(found["relative"])
    shades = np.sqrt(relative) if record["magnitude"] == "square" else relative  # the shade follows |x| either way
    shown = np.where(active == 1, 0.25 + 0.75 * np.sqrt(shades), 0.0)
    axes.imshow(shown, aspect="auto", interpolation="nearest", cmap=SHADES, vmin=0, vmax=1)
    often = active.sum(axis=0)
    for count in range(int(often.max()), 0, -1):
        inside = np.flatnonzero(often == count)
        if len(inside):
            axes.axvline(inside[-1] + 0.5, color="#0072B2", linewidth=1)
        if len(inside) > 0.06 * len(often):  # room for a word
            axes.annotate(
                f"in {count}", (inside.mean(), 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                fontsize=8,
            )  # fmt: skip
    numbers = range(active.shape[0], 0, -1)
    counts = f"{'/'.join(str(int((often == n).sum())) for n in numbers)} of {record['hidden_size']}"
    noise = "/".join(
        f"{dims:.0f}" for dims in independent_in(record["hidden_size"], found["share"], active.shape[0])[:0:-1]
    )
    axes.set_yticks(
        range(len(record["map_tokens"])), [shown_token(text) for text in record["map_tokens"]], parse_math=False
    )
    finish(axes, "", "dims, clustered by the tokens they are highly active in", "consecutive tokens")
    axes.grid(False)
    axes.set_title(
        f"{title}, layer {record['layer']}, attention input: top {found['share']:.0%} of each token's dims\nactive in "
        f"{'/'.join(map(str, numbers))} tokens: {counts} (Gaussian noise: {noise})",
        loc="left", fontsize=10, pad=16,
    )  # fmt: skip
    return save(figure, folder, "fig5_activation_map")
