"""Figures of the observation study (Figs. 3-5 of the paper) from its record; the paper's own numbers are hollow stars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mohd_train.analysis.architecture import COMPONENT_POINTS, COMPONENTS
from mohd_train.analysis.plotting import PAPER, SHADES, finish, panels, percent_scale, save, style, whole_numbers

Record = dict[str, Any]

# Fig. 3 and 4 of arXiv:2412.05644, LLaMA2-7B (4096 dims): attention input of layer 16.
PAPER_CUMULATIVE = {100 * 1000 / 4096: 71.96, 50.0: 92.54}  # percent of the dims -> percent of the magnitude
PAPER_COMMON = {2: 100 * 2672 / 4096, 9: 100 * 673 / 4096}  # consecutive tokens -> percent of the dims
PAPER_NARROWEST = 6.7  # percent: attention's output of its input

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


def draw_observation(record: Record, title: str, folder: Path) -> list[Path]:
    """Draws all of them into ``folder``; returns the files.

    Args:
        record: of :func:`mohd_train.analysis.study.observe`.
        title: names the model.
    """
    draw = (_cumulative, _sparsity, _flow, _common, _map)
    return [path for each in draw for path in each(record, title, folder)]


def _cumulative(record: Record, title: str, folder: Path) -> list[Path]:
    figure, (axes, by_position) = panels(2)
    width = record["hidden_size"]
    share = 100 * np.arange(width + 1) / width
    for number, point in enumerate(COMPONENT_POINTS):
        curve = [0.0, *(100 * value for value in record["closely"][point]["curve"])]
        axes.plot(share, curve, label=NAMES[point], **style(number, max(1, width // 8)))
    axes.plot([*PAPER_CUMULATIVE], [*PAPER_CUMULATIVE.values()], label="paper: LLaMA2-7B,\nattention input", **PAPER)
    top = 100 * record["top_dims"] / width
    axes.axvline(top, color="#888888", linewidth=0.8)
    axes.annotate(
        f"top {record['top_dims']} of {width} dims", (top, 3), fontsize=8, xytext=(4, 0), textcoords="offset points"
    )
    axes.legend(frameon=False, fontsize=8)
    finish(
        axes, f"{title}, layer {record['layer']}: magnitude held by the largest dims", "% of the dims", "% of magnitude"
    )
    for number, point in enumerate(COMPONENT_POINTS):
        values = record["closely"][point]["by_position"]["share_of_half"]
        shown = [np.nan if value is None else 100 * value for value in values]
        by_position.plot(shown, label=NAMES[point], **style(number, max(1, len(shown) // 8)))
    finish(by_position, "Held by 50% of the dims, by token position", "position in the sequence", "% of magnitude")
    by_position.legend(frameon=False, fontsize=8)
    return save(figure, folder, "fig3a_cumulative_magnitude")


def _sparsity(record: Record, title: str, folder: Path) -> list[Path]:
    figure, axes = panels(2)
    measures = (("sparsity", "1 - dims for 90% of the magnitude / D"), ("hoyer", "Hoyer sparsity"))
    for axis, (measure, name) in zip(axes, measures, strict=True):
        for number, point in enumerate(COMPONENT_POINTS):
            axis.plot(_by_layer(record, point, measure), label=NAMES[point], **style(number))
        axis.set_ylim(0, 1)
        whole_numbers(axis)
        finish(axis, f"{title}: sparsity by layer", "layer", name)
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, folder, "fig3b_sparsity_by_layer")


def _by_layer(record: Record, point: str, measure: str) -> list[float]:
    values = [layer["points"][point][measure] for layer in record["layers"]]
    return [np.nan if value is None else value for value in values]


def _flow(record: Record, title: str, folder: Path) -> list[Path]:
    figure, (block, own) = panels(2)
    for number, point in enumerate(("attention_out", "after_attention", "ffn_out", "block_out")):
        values = [layer["flow_percent_of_block_input"][point] for layer in record["layers"]]
        block.plot(_numbers(values), label=NAMES[point], **style(number))
    finish(block, f"{title}: activation flow (Fig. 4)", "layer", "magnitude, % of the block's input")
    for number, component in enumerate(COMPONENTS):
        values = [layer["flow_percent_of_own_input"][component] for layer in record["layers"]]
        own.plot(_numbers(values), label=NAMES[component], **style(number))
    own.axhline(PAPER_NARROWEST, color="#888888", linewidth=0.8)
    own.annotate("paper: attention at its narrowest, 6.7%", (0, PAPER_NARROWEST), fontsize=8, va="bottom")
    finish(own, "Output of a component against its own input", "layer", "magnitude, % of its input")
    for axes in (block, own):
        percent_scale(axes)
        whole_numbers(axes)
        axes.legend(frameon=False, fontsize=8)
    return save(figure, folder, "fig4_activation_flow")


def _numbers(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _common(record: Record, title: str, folder: Path) -> list[Path]:
    figure, (axes,) = panels(1, width=6.5)
    width = record["hidden_size"]
    for number, found in enumerate(record["closely"]["attention_in"]["common_activity"]):
        tokens = [n for n in map(int, found["common"]) if n > 1]
        look = style(number)
        percent = [100 * found["common"][str(n)] / width for n in tokens]
        axes.plot(tokens, percent, label=f"top {found['share']:.0%} of a token's dims active", **look)
        chance = [100 * found["independent"][str(n)] / width for n in tokens]
        axes.plot(tokens, chance, color=look["color"], linewidth=0.7, linestyle=":", label="  were tokens independent")
    axes.plot([*PAPER_COMMON], [*PAPER_COMMON.values()], label="paper: LLaMA2-7B", **PAPER)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    name = f"{title}, layer {record['layer']}: dims active in all of n tokens"
    finish(axes, f"{name} (attention input)", "consecutive tokens n", f"% of the {width} dims")
    return save(figure, folder, "fig3c_common_activity")


def _map(record: Record, title: str, folder: Path) -> list[Path]:
    found = record["closely"]["attention_in"]["map"]
    figure, (axes,) = panels(1, width=10.0, height=3.2)
    active = np.array(found["active"])
    shown = np.where(active == 1, 0.25 + 0.75 * np.sqrt(np.array(found["relative"])), 0.0)
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
    counts = f"in {'/'.join(map(str, numbers))} tokens: {'/'.join(str(int((often == n).sum())) for n in numbers)}"
    axes.set_yticks(range(len(record["map_tokens"])), record["map_tokens"])
    finish(axes, "", "dims, clustered by the tokens they are highly active in", "consecutive tokens")
    axes.grid(False)
    axes.set_title(
        f"{title}, layer {record['layer']}, attention input: top {found['share']:.0%} of each token's dims; "
        f"dims active {counts}",
        loc="left", fontsize=10, pad=16,
    )  # fmt: skip
    return save(figure, folder, "fig5_activation_map")
