"""The observation study (Section 3): activations of every layer, streamed into one record, from which tables and figures are
made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mohd_train.analysis.architecture import COMPONENT_POINTS, COMPONENTS, POINTS, find_blocks, hooked
from mohd_train.analysis.corpus import Corpus
from mohd_train.analysis.options import StudyOptions
from mohd_train.analysis.statistics import HOLD, CommonActivity, MagnitudeStatistics, active_dims, gaussian
from mohd_train.analysis.subject import Subject
from mohd_train.errors import UserError

Advance = Callable[[], None]

PAPER_TOP = 1000 / 4096  # "top 1000 dims" of LLaMA2-7B
LONGEST = 9  # consecutive tokens

THRESHOLDS = tuple(percent / 100 for percent in range(5, 100, 5))  # shares of the dims: the x axis of Fig. 3 right


def definitions(magnitude: str, epsilon: float) -> dict[str, str]:
    """What the numbers of a record mean. P: the paper says it in words; R: this project's interpretation."""
    m = {"square": "x**2", "absolute": "|x|"}[magnitude]
    source = "P, eq. 1" if magnitude == "square" else "not the paper's, which is x**2"
    return {
        "magnitude": f"{m} of a dim ({source}); of a point of the model, its mean over tokens and dims",
        "cumulative": f"a token's {m} sorted downwards, summed up and divided by their sum; mean over tokens",
        "sparsity": f"share of a token's {m} below epsilon = {epsilon:g} (P, eq. 2; R: the value of epsilon); mean over tokens",
        "sparsity_gaussian": "the same of Gaussian noise with the mean square of each token",
        "sparsity_relative": f"share of a token's {m} below epsilon times the token's mean {m}; mean over tokens",
        "concentration": f"1 - (fewest dims that hold {HOLD:.0%} of a token's sum of {m}) / D; mean over tokens",
        "hoyer": f"(sqrt(D) - l1/l2) / (sqrt(D) - 1) of a token's {m}: 0 for equal dims, 1 for a single one; mean over tokens",
        "active": f"a dim is active for a token when its {m} is among the top share of that token's dims (R)",
        "flow_percent_of_block_input": "magnitude of a point / magnitude of block_in, in percent (R: Fig. 4 and its 6.7%)",
        "flow_percent_of_own_input": "magnitude of a component's output / magnitude of its normalized input, in percent",
        "_per_token": "the same ratio for each token, geometric mean over tokens: what few huge activations can't decide",
        "common": "mean over windows of n consecutive tokens of the number of dims active in all of them",
        "independent": "the same were tokens independent, as Gaussian noise is: D * share**n",
        "active_in": "mean over windows of the number of dims active in exactly 0, 1, .. of the window's tokens",
        "gaussian": "standard Gaussian noise of the same width through the same code, seeded",
        "layers": "counted from 0; of a MoHD component, the input is the whole normalized x and the output is after group fusion",
    }


def checked(options: StudyOptions, layers: int, width: int) -> tuple[int, int]:
    """(layer to study in detail, top dims). Raises :class:`UserError` for options that don't fit this model."""
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


class _Flow:
    """Each token's magnitude at a point relative to the same token's at an earlier point: mean logarithm of the ratio."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}  # point -> [B, T], of the block that runs
        self._logs: dict[tuple[int, str, str], tuple[float, int]] = {}  # layer, point, against -> sum, tokens

    def __call__(self, layer: int, point: str, magnitude_BT: Tensor) -> None:
        self._seen[point] = magnitude_BT  # block_in comes first, and a component's input before its output
        own = point.replace("_out", "_in") if point in ("attention_out", "ffn_out") else "block_in"
        for against in dict.fromkeys(("block_in", own)):
            whole = self._seen[against]
            both = (magnitude_BT > 0) & (whole > 0)
            total, tokens = self._logs.get((layer, point, against), (0.0, 0))
            logs = (magnitude_BT[both] / whole[both]).log().sum().item()
            self._logs[layer, point, against] = (total + logs, tokens + int(both.sum()))

    def percent(self, layer: int, point: str, against: str) -> float | None:
        total, tokens = self._logs[layer, point, against]
        return 100 * math.exp(total / tokens) if tokens else None


class _Study:
    """Receives every activation and keeps only sums."""

    def __init__(self, options: StudyOptions, layer: int, top: int, width: int, corpus: Corpus, device: torch.device):
        self.options, self.layer, self.width = options, layer, width
        self._new = lambda position: MagnitudeStatistics(
            width, top, position, device, options.magnitude, options.epsilon
        )
        self.top, self._positions = top, corpus.seq_len
        self.magnitude: dict[tuple[int, str], MagnitudeStatistics] = {}
        shares = tuple(dict.fromkeys((*options.shares, options.highly_active)))
        self.common = {
            point: CommonActivity(width, shares, min(LONGEST, corpus.seq_len), options.map_tokens)
            for point in COMPONENT_POINTS
        }
        self.window: dict[str, Tensor] = {}  # point -> [map_tokens, D] of the map's example
        self.flow = _Flow()

    def __call__(self, layer: int, point: str, x_BTD: Tensor) -> None:
        closely = layer == self.layer and point in COMPONENT_POINTS
        key = (layer, point)
        if key not in self.magnitude:
            self.magnitude[key] = self._new(self._positions if closely else 0)
        self.flow(layer, point, self.magnitude[key].add(x_BTD))
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
        UserError: the architecture isn't understood, the options don't fit it, or there is too little text.
    """
    parts = find_blocks(subject.model, options.attention_module, options.ffn_module)
    width = subject.hidden_size
    layer, top = checked(options, len(parts), width)
    study = _Study(options, layer, top, width, corpus, subject.device)
    tokens: dict[str, int] = {}
    example: list[int] = []
    with hooked(parts, study) as hooks:
        for batch in corpus.batches(options.tokens, options.batch_size):
            if not example:
                start = max(0, (corpus.seq_len - options.map_tokens) // 2)
                example = batch.ids_BT[0, start : start + options.map_tokens].tolist()
            subject.model(batch.ids_BT.to(subject.device), use_cache=False)
            tokens[batch.domain] = tokens.get(batch.domain, 0) + batch.ids_BT.numel()
            advance()
    return {
        "magnitude": options.magnitude,
        "epsilon": options.epsilon,
        "hidden_size": width,
        "layer": layer,
        "top_dims": top,
        "tokens": tokens,
        "seq_len": corpus.seq_len,
        "residual_error": hooks.residual_error,
        "layers": [_layer(study, index) for index in range(len(parts))],
        "closely": {
            point: {
                "curve": [round(value, 6) for value in study.magnitude[layer, point].curve().tolist()],
                "by_position": study.magnitude[layer, point].positions(),
                "common_activity": study.common[point].summary(),
                "common_by_threshold": _by_threshold(study.common[point]),
                "map": _map(study.window[point], options.highly_active, options.magnitude),
            }
            for point in COMPONENT_POINTS
        },
        "gaussian": gaussian(width, top, options.magnitude, options.epsilon),
        "map_tokens": token_texts(subject.tokenizer, example),
        "definitions": definitions(options.magnitude, options.epsilon),
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
        "flow_percent_of_block_input_per_token": {p: study.flow.percent(layer, p, "block_in") for p in POINTS},
        "flow_percent_of_own_input_per_token": {
            kind: study.flow.percent(layer, f"{kind}_out", f"{kind}_in") for kind in COMPONENTS
        },
    }


def _by_threshold(common: CommonActivity) -> dict[str, Any]:
    """Fig. 3 right: for every threshold, the dims active in all of n consecutive tokens, and the number expected by chance."""
    every = [(common.common(share), common.independent(share)) for share in THRESHOLDS]
    return {
        "shares": list(THRESHOLDS),
        "common": {n: [found[n] for found, _ in every] for n in every[0][0]},
        "independent": {n: [chance[n] for _, chance in every] for n in every[0][1]},
    }


def _map(x_TD: Tensor, share: float, magnitude: str = "square") -> dict[str, Any]:
    """Fig. 5 for a few consecutive tokens: which dims are highly active in which, dims clustered by their pattern.

    Dims are sorted by the number of tokens they are active in, then by which tokens these are, then by magnitude. Dims active
    in none are left out. ``relative`` is a dim's magnitude divided by the token's largest.
    """
    magnitude_TD = x_TD.square() if magnitude == "square" else x_TD.abs()
    active = active_dims(x_TD.abs(), share)
    often = active.sum(dim=0)
    absent = (~active).int().T.tolist()  # the tokens in which a dim is not active: compared from the first token on
    total = magnitude_TD.sum(dim=0).tolist()
    order = sorted(often.nonzero().flatten().tolist(), key=lambda dim: (sum(absent[dim]), absent[dim], -total[dim]))
    relative = magnitude_TD / magnitude_TD.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "share": share,
        "active_in_all": int((often == active.shape[0]).sum()),
        "active_in_one_only": int((often == 1).sum()),
        "active_in_one_only_by_token": (active & (often == 1)).sum(dim=1).tolist(),
        "dims": order,
        "active": active[:, order].int().tolist(),
        "relative": [[round(value, 4) for value in row] for row in relative[:, order].tolist()],
    }


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> list[str]:
    """The text that each token adds, with its space; U+FFFD for part of a character. Without a tokenizer, the ids."""
    if tokenizer is None:
        return [str(token) for token in ids]

    def text(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    found = []
    for index, token in enumerate(ids):
        before, after = text(ids[:index]), text(ids[: index + 1])  # a token by itself loses its space in SentencePiece
        found.append(after[len(before) :] if index and after.startswith(before) else text([token]))
    return found
