"""The models of the paper's Tables 1, 2 and 5, composed from ``configs/``, with the paper's own figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from mohd_train import resources
from mohd_train.config.load import load_model_plan
from mohd_train.config.plan import ModelPlan

BASES = ("355m", "495m", "1.13b")
SETTINGS = ("dense", "50", "75", "x2", "x3", "x4")
# Table 5, (attention, FFN); "100" is routed with every sub-dimension active, "dense" is LLaMA.
DECOUPLED = (("100", "100"), ("100", "50"), ("50", "100"), ("100", "25"), ("25", "100"), ("25", "25"))


def model_name(base: str, attention: str, ffn: str) -> str:
    """``355m-x2``, or ``355m-attn50-ffn100`` where the components differ."""
    return f"{base}-{attention}" if attention == ffn else f"{base}-attn{attention}-ffn{ffn}"


def compose(base: str, attention: str, ffn: str | None = None) -> ModelPlan:
    """The plan of ``configs/model/{base}.yaml`` with the attention of one MoHD setting and the FFN of another."""
    configs = resources.path("configs")
    base_file = str(configs / "model" / f"{base}.yaml")
    plan = load_model_plan([base_file, str(configs / "mohd" / f"{attention}.yaml")])
    if ffn is None or ffn == attention:
        return plan
    other = load_model_plan([base_file, str(configs / "mohd" / f"{ffn}.yaml")])
    assert other.hidden_size == plan.hidden_size, "attention and FFN must tile the same hidden size"
    return replace(plan, name=model_name(base, attention, ffn), ffn=other.ffn)


def paper_models() -> list[tuple[ModelPlan, dict[str, str]]]:
    """Every model of Tables 1, 2 and 5 with the paper's figures, ``{"activated": "289M", "total": "355M"}``."""
    paper = yaml.safe_load(resources.path("eval/paper/results.yaml").read_text(encoding="utf-8"))
    figures = _paper_figures(paper)
    plans = [compose(base, setting) for base in BASES for setting in SETTINGS]
    plans.append(compose("2.7b", "dense"))
    plans += [compose("355m", attention, ffn) for attention, ffn in DECOUPLED]
    return [(plan, figures[plan.name]) for plan in plans]


def _paper_figures(paper: dict[str, Any]) -> dict[str, dict[str, str]]:
    figures = {}
    for row in paper["table2_results"]:
        setting = row["setting"].rstrip("%")
        figures[model_name(row["base"].lower(), setting, setting)] = {
            "activated": row["activated"],
            "total": row["params"],
        }
    decoupled = paper["table5_decoupled"]
    base = decoupled["base"].lower()
    for row in decoupled["rows"]:
        name = model_name(base, row["attention"].rstrip("%"), row["ffn"].rstrip("%"))
        figures.setdefault(name, {"activated": row["activated"], "total": figures[f"{base}-dense"]["total"]})
    return figures


def agrees(value: int, shown: str) -> bool:
    """Whether ``shown`` ("289M", "1.13B") is ``value`` rounded or truncated to the digits shown (the paper does both)."""
    number, unit = shown[:-1], {"M": 10**6, "B": 10**9}[shown[-1]]
    digits = len(number.partition(".")[2])
    step = unit // 10**digits
    target = round(float(number) * 10**digits)
    return target in (value // step, (value + step // 2) // step)
