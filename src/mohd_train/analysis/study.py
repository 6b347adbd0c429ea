"""The observation study (Section 3): activations of every layer, streamed, as one record that tables and figures are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mohd_train.analysis.architecture import COMPONENT_POINTS, COMPONENTS, POINTS, find_blocks, tapped
from mohd_train.analysis.corpus import Corpus
from mohd_train.analysis.options import StudyOptions
from mohd_train.analysis.statistics import HOLD, CommonActivity, MagnitudeStatistics, active_dims
from mohd_train.analysis.subject import Subject
from mohd_train.errors import UserError

Advance = Callable[[], None]

PAPER_TOP = 1000 / 4096  # "top 1000 dims" of LLaMA2-7B
LONGEST = 9  # consecutive tokens

DEFINITIONS = {
    "magnitude": "mean over tokens and dims of |x|",
    "active": "a dim is active for a token when its |x| is among the top share of that token's dims (eqs. 1-2 as read here)",
    "cumulative": "a token's |x| sorted downwards, summed up and divided by their sum; mean over tokens",
    "sparsity": f"1 - (fewest dims that hold {HOLD:.0%} of a token's sum of |x|) / D; mean over tokens",
    "hoyer": "(sqrt(D) - l1/l2) / (sqrt(D) - 1) of a token: 0 for equal dims, 1 for a single one; mean over tokens",
    "flow_percent_of_block_input": "magnitude of a point / magnitude of block_in, in percent",
    "flow_percent_of_own_input": "magnitude of a component's output / magnitude of its (normalized) input, in percent",
    "common": "mean over windows of n consecutive tokens of the number of dims active in all of them",
    "independent": "the same were tokens independent: D * share**n",
    "active_in": "mean over windows of the number of dims active in exactly 0, 1, .. of the window's tokens",
    "layers": "counted from 0; of a MoHD component, the input is the whole normalized x and the output is after group fusion",
}


def checked(options: StudyOptions, layers: int, width: int) -> tuple[int, int]:
    """(layer to look at closely, top dims). Raises :class:`UserError` for options that mean nothing for this model."""
    layer = layers // 2 if options.layer is None else options.layer
    if not 0 <= layer < layers:
        raise UserError(f"--layer {layer}: the model has layers 0 .. {layers - 1}")
    top = max(1, round(PAPER_TOP * width)) if options.top_dims is None else options.top_dims
    if not 1 <= top <= width:
        raise UserError(f"--top-dims {top}: the model has {width} dims")
    for share in (*options.shares, options.highly_active):
        if not 0 < share < 1:
            raise UserError(f"share of active dims {share:g}: give one between 0 and 1, such as 0.2")
    return layer, top


class _Study:
    """Receives every activation; keeps sums only."""

    def __init__(self, options: StudyOptions, layer: int, top: int, width: int, corpus: Corpus, device: torch.device):
        self.options, self.layer, self.width = options, layer, width
        self._new = lambda position: MagnitudeStatistics(width, top, position, device)
        self.top, self._positions = top, corpus.seq_len
        self.magnitude: dict[tuple[int, str], MagnitudeStatistics] = {}
        shares = tuple(dict.fromkeys((*options.shares, options.highly_active)))
        self.common = {
            point: CommonActivity(width, shares, min(LONGEST, corpus.seq_len), options.map_tokens)
            for point in COMPONENT_POINTS
        }
        self.window: dict[str, Tensor] = {}  # point -> [map_tokens, D] of the map's example

    def __call__(self, layer: int, point: str, x_BTD: Tensor) -> None:
        closely = layer == self.layer and point in COMPONENT_POINTS
        key = (layer, point)
        if key not in self.magnitude:
            self.magnitude[key] = self._new(self._positions if closely else 0)
        self.magnitude[key].add(x_BTD)
        if closely:
            self.common[point].add(x_BTD)
            if point not in self.window:
                start = max(0, (x_BTD.shape[1] - self.options.map_tokens) // 2)
                self.window[point] = x_BTD[0, start : start + self.options.map_tokens].cpu()


@torch.inference_mode()
def observe(subject: Subject, corpus: Corpus, options: StudyOptions, advance: Advance = lambda: None) -> dict[str, Any]:
    """Runs the model over the corpus once and returns the record: plain numbers, JSON-ready.

    Args:
        advance: called after each batch.
    Raises:
        UserError: an architecture that isn't understood, options that don't fit it, or too little text.
    """
    parts = find_blocks(subject.model, options.attention_module, options.ffn_module)
    width = subject.hidden_size
    layer, top = checked(options, len(parts), width)
    study = _Study(options, layer, top, width, corpus, subject.device)
    tokens: dict[str, int] = {}
    example: list[int] = []
    with tapped(parts, study) as taps:
        for batch in corpus.batches(options.tokens, options.batch_size):
            if not example:
                start = max(0, (corpus.seq_len - options.map_tokens) // 2)
                example = batch.ids_BT[0, start : start + options.map_tokens].tolist()
            subject.model(batch.ids_BT.to(subject.device), use_cache=False)
            tokens[batch.domain] = tokens.get(batch.domain, 0) + batch.ids_BT.numel()
            advance()
    return {
        "hidden_size": width,
        "layer": layer,
        "top_dims": top,
        "tokens": tokens,
        "seq_len": corpus.seq_len,
        "residual_error": taps.residual_error,
        "layers": [_layer(study, index) for index in range(len(parts))],
        "closely": {
            point: {
                "curve": [round(value, 6) for value in study.magnitude[layer, point].curve().tolist()],
                "by_position": study.magnitude[layer, point].positions(),
                "common_activity": study.common[point].summary(),
                "map": _map(study.window[point], options.highly_active),
            }
            for point in COMPONENT_POINTS
        },
        "map_tokens": _words(subject, example),
        "definitions": DEFINITIONS,
    }


def _layer(study: _Study, layer: int) -> dict[str, Any]:
    """One layer: every point's statistics, and the flow through the block (Fig. 4)."""
    at = {point: study.magnitude[layer, point] for point in POINTS}

    def percent(part: float, whole: float) -> float | None:
        return 100 * part / whole if whole else None

    return {
        "points": {point: at[point].summary() for point in POINTS},
        "flow_percent_of_block_input": {p: percent(at[p].magnitude, at["block_in"].magnitude) for p in POINTS},
        "flow_percent_of_own_input": {
            kind: percent(at[f"{kind}_out"].magnitude, at[f"{kind}_in"].magnitude) for kind in COMPONENTS
        },
    }


def _map(x_TD: Tensor, share: float) -> dict[str, Any]:
    """Fig. 5 of a few consecutive tokens: which are highly active where, dims clustered by their pattern.

    The dims come in order of the number of tokens they are active in, then of the tokens themselves, then of magnitude; those
    active in none are left out. ``relative`` is |x| over the token's largest.
    """
    magnitude = x_TD.abs()
    active = active_dims(magnitude, share)
    often = active.sum(dim=0)
    pattern = (active.long() * (2 ** torch.arange(active.shape[0] - 1, -1, -1))[:, None]).sum(dim=0)
    keys = list(zip((-often).tolist(), (-pattern).tolist(), (-magnitude.sum(dim=0)).tolist(), strict=True))
    order = sorted((dim for dim, key in enumerate(keys) if key[0]), key=lambda dim: keys[dim])
    relative = magnitude / magnitude.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "share": share,
        "active_in_all": int((often == active.shape[0]).sum()),
        "active_in_one_only": int((often == 1).sum()),
        "active_in_one_only_by_token": (active & (often == 1)).sum(dim=1).tolist(),
        "dims": order,
        "active": active[:, order].int().tolist(),
        "relative": [[round(value, 4) for value in row] for row in relative[:, order].tolist()],
    }


def _words(subject: Subject, ids: list[int]) -> list[str]:
    if subject.tokenizer is None:
        return [str(token) for token in ids]
    return [str(token) for token in subject.tokenizer.convert_ids_to_tokens(ids)]
