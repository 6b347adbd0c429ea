from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mohd_train.config.catalogue import agrees, compose, paper_models
from mohd_train.model.count import count, count_parameters

# The paper's numbers, worked out by hand from Table 1's sizes (activated, total); a change here is a change of the model.
EXPECTED = {
    "355m-dense": (289_406_976, 354_942_976),
    "355m-50": (144_703_488, 354_942_976),
    "355m-75": (217_055_232, 354_942_976),
    "355m-x2": (289_406_976, 709_885_952),
    "355m-x3": (289_406_976, 1_064_828_928),
    "355m-x4": (289_406_976, 1_419_771_904),
    "355m-attn100-ffn50": (195_035_136, 354_942_976),
    "355m-attn50-ffn100": (239_075_328, 354_942_976),
    "355m-attn100-ffn25": (147_849_216, 354_942_976),
    "355m-attn25-ffn100": (213_909_504, 354_942_976),
    "355m-25": (72_351_744, 354_942_976),
    "355m-100": (289_406_976, 354_942_976),
}
MILLIONS = {
    "495m-dense": (396.362, 494.666),
    "495m-50": (198.181, 494.666),
    "495m-75": (297.271, 494.666),
    "495m-x2": (396.362, 989.331),
    "495m-x3": (396.362, 1483.997),
    "495m-x4": (396.362, 1978.663),
    "1.13b-dense": (1006.633, 1137.705),
    "1.13b-50": (503.316, 1137.705),
    "1.13b-75": (754.975, 1137.705),
    "1.13b-x2": (1006.633, 2275.410),
    "1.13b-x3": (1006.633, 3413.115),
    "1.13b-x4": (1006.633, 4550.820),
    "2.7b-dense": (2537.554, 2701.394),
}


@pytest.fixture(scope="module")
def models():
    return paper_models()


def test_every_number_of_tables_1_2_and_5(models) -> None:
    counts = {plan.name: count(plan) for plan, _ in models}
    assert set(counts) == set(EXPECTED) | set(MILLIONS)
    for name, expected in EXPECTED.items():
        assert (counts[name].activated, counts[name].total) == expected, name
    for name, expected in MILLIONS.items():
        assert (round(counts[name].activated / 1e6, 3), round(counts[name].total / 1e6, 3)) == expected, name


def test_the_papers_own_figures_agree(models) -> None:
    for plan, paper in models:
        counts = count(plan)
        assert agrees(counts.activated, paper["activated"]), plan.name
        assert agrees(counts.total, paper["total"]), plan.name


def test_agreement_can_fail() -> None:
    assert agrees(147_849_216, "147M")  # truncated
    assert agrees(147_849_216, "148M")  # rounded
    assert not agrees(147_849_216, "146M")
    assert not agrees(1_137_704_960, "1.15B")


@pytest.mark.parametrize("name", ["355m-x4", "1.13b-x4", "2.7b-dense"])
def test_counts_equal_the_model_on_the_meta_device(models, name: str) -> None:
    plan = next(plan for plan, _ in models if plan.name == name)
    counts = count(plan)
    built = count_parameters(plan)
    assert {part: getattr(counts, part) for part in built} == built


def test_router_and_fusion_have_columns_of_their_own() -> None:
    counts = count(compose("355m", "x4"))
    assert (counts.router, counts.fusion) == (3_145_728, 3_145_728)


def test_flops_are_two_per_weight_and_the_causal_scores() -> None:
    plan = compose("355m", "dense")
    counts = count(plan, seq_len=4096)
    keys = sum(range(1, 4097)) / 4096
    assert counts.flops_per_token == 2 * (289_406_976 + 32_768_000) + 24 * 2 * 2 * 1024 * keys
    ratio = count(compose("355m", "x2"), 4096).flops_per_token / counts.flops_per_token
    assert 1.07 < ratio < 1.09


def test_command_line_json(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "scripts/count.py", "configs/model/355m.yaml", "configs/mohd/x2.yaml", "--json"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(run.stdout)
    assert (row["name"], row["activated"], row["total"]) == ("355m-x2", *EXPECTED["355m-x2"])
    assert set(row) >= {"embedding", "head", "norms", "router", "fusion", "flops_per_token"}


def test_command_line_error(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "scripts/count.py", "configs/model/355m.yaml", "configs/mohd/x2.yaml", "mohd.ffn.sub_dims=7"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.strip() == (
        "error: override 'mohd.ffn.sub_dims=7': mohd.ffn.sub_dims is 7, which does not divide the hidden "
        "size 2048 (mohd.expansion x model.hidden_size); nearest that do: 2, 4, 8"
    )
