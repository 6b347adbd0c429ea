"""Interventions do what they say, and their measure finds what was built in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.analysis import hf_folder, llama, native, subject_of, text_folder
from support.plans import small_plan

from mohd_train.analysis import knockout as study
from mohd_train.analysis.corpus import open_corpus
from mohd_train.analysis.interventions import applies, intervene, sub_dimensions
from mohd_train.analysis.knockout import count_steps, knockout
from mohd_train.analysis.options import KnockoutOptions
from mohd_train.errors import UserError
from mohd_train.model.llama import Transformer

IDS = torch.arange(4, 68).reshape(2, 32)


def model(setting: str = "x2", kernels: str = "auto", **mohd) -> Transformer:
    built = Transformer(small_plan(setting, **mohd), kernels, seed=5).eval()
    for name, parameter in built.named_parameters():
        if name.endswith("router.centroids"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() > 1:
            parameter.data *= 3  # large enough for a component to matter
    return built


@pytest.mark.parametrize("kernels", ["reference", "grouped"])
@pytest.mark.parametrize("fusion", ["grouped", "none"])
@pytest.mark.parametrize("component", ["attention", "ffn"])
@torch.no_grad()
def test_removed_equals_weights_without_the_sub_dimension(component: str, fusion: str, kernels: str) -> None:
    """Zeroing a sub-dimension's columns of the input projections and its rows of the output projection is the same thing."""
    built = model(kernels=kernels, fusion=fusion)
    if fusion == "grouped":
        for block in built.blocks:
            torch.nn.init.normal_(getattr(block, component).sub_dimensions.fusion.blocks)
    for index in (1, 5):  # a shared and a specialized one
        with intervene(sub_dimensions(built, 0, component), "removed", index):
            found = built(IDS).logits
        ablated = model(kernels=kernels, fusion=fusion)
        ablated.load_state_dict(built.state_dict())
        part = getattr(ablated.blocks[0], component)
        width = part.sub_dimensions.plan.width
        dims = slice(index * width, (index + 1) * width)
        for name, parameter in part.named_parameters():
            if name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"):
                parameter[:, dims] = 0
            elif name in ("o_proj.weight", "down_proj.weight"):
                parameter[dims] = 0
        assert torch.allclose(found, ablated(IDS).logits, atol=1e-5)
        assert not torch.allclose(found, built(IDS).logits, atol=1e-4)


@pytest.mark.parametrize(("setting", "routing"), [("x2", "learned"), ("75", "learned"), ("75", "random")])
@torch.no_grad()
def test_forced_is_active_everywhere_and_banned_nowhere(setting: str, routing: str) -> None:
    built = model(setting, routing=routing)
    plan = built.plan.ffn
    sub, before = sub_dimensions(built, 1, "ffn"), built(IDS)
    index = plan.sub_dims - 1
    with intervene(sub, "forced", index):
        forced = built(IDS).routing[1].ffn
    with intervene(sub, "banned", index):
        banned = built(IDS).routing[1].ffn
    assert (forced.indices == index).any(dim=1).all()
    assert not (banned.indices == index).any()
    unchanged = before.routing[1].ffn
    for changed in (forced, banned):
        assert changed.indices.shape[1] == plan.top_k
        assert (changed.indices[:, 1:] > changed.indices[:, :-1]).all()
        assert torch.allclose(changed.scores, unchanged.scores)
        assert torch.allclose(changed.weights.sum(dim=1), torch.tensor(float(plan.top_k)))
    chosen = (unchanged.indices == index).any(dim=1)
    assert torch.equal(forced.indices[chosen], unchanged.indices[chosen])  # it was chosen anyway
    assert torch.equal(banned.indices[~chosen], unchanged.indices[~chosen])
    assert torch.equal(built(IDS).logits, before.logits)  # nothing is left behind


def test_what_means_nothing_is_left_out() -> None:
    plan = small_plan("x2").attention
    assert [kind for kind in ("removed", "banned", "forced") if applies(kind, plan, 0)] == ["removed"]
    assert all(applies(kind, plan, 3) for kind in ("removed", "banned", "forced"))
    assert not applies("forced", small_plan("100").ffn, 3)
    assert not applies("banned", small_plan("shared-only").ffn, 6)


@pytest.mark.parametrize("routing", ["learned", "random"])
def test_resuming_at_a_layer_equals_the_whole_model(routing: str) -> None:
    built = model(routing=routing)
    with torch.inference_mode():
        baseline, entries, _ = study._unchanged(built, IDS)
        assert np.mean(baseline) == pytest.approx(built(IDS, labels_BT=IDS).cross_entropy.item(), rel=1e-5)
        for layer in range(2):
            assert study._from_layer(built, layer, entries[layer], IDS) == pytest.approx(baseline, abs=1e-6)
            with intervene(sub_dimensions(built, layer, "attention"), "removed", 0):
                resumed = study._from_layer(built, layer, entries[layer], IDS)
                whole = built(IDS, labels_BT=IDS).cross_entropy.item()
            assert np.mean(resumed) == pytest.approx(whole, rel=1e-5)


def test_a_sub_dimension_without_weights_does_not_matter(tmp_path: Path) -> None:
    subject = subject_of(native(tmp_path / "run", spread=0.3))
    corpus = open_corpus(text_folder(tmp_path / "text"), subject, 32)
    part = subject.transformer.blocks[0].ffn
    with torch.no_grad():
        part.down_proj.weight *= 20
        part.down_proj.weight[6 * 16 : 7 * 16] = 0
        for projection in (part.gate_proj, part.up_proj):
            projection.weight[:, 6 * 16 : 7 * 16] = 0
    options = KnockoutOptions(tokens=256, layers=(0,))
    steps = []
    record = knockout(subject, corpus, options, advance=lambda: steps.append(1))
    # x2: 8 removed, 5 banned, 5 forced of each component; two batches, one a domain
    assert len(record["effects"]) == 2 * 18
    assert len(steps) == count_steps(subject.transformer, options, 2, scored=False) == 72
    ffn = {(row["sub_dimension"], row["kind"]): row for row in record["effects"] if row["component"] == "ffn"}
    assert ffn[6, "removed"]["delta_nll"] == pytest.approx(0, abs=1e-7)
    assert abs(ffn[0, "removed"]["delta_nll"]) > 1e-4
    assert ffn[0, "removed"]["share"] == 1
    assert ffn[0, "removed"]["shared"]
    assert sum(ffn[i, "removed"]["share"] for i in range(8)) == pytest.approx(4)
    assert ffn[0, "removed"]["delta_perplexity"] == pytest.approx(
        ffn[0, "removed"]["perplexity"] - record["baseline"]["perplexity"]
    )
    json.dumps(record, allow_nan=False)


def test_task_scores_are_taken_under_the_intervention(tmp_path: Path) -> None:
    subject = subject_of(native(tmp_path / "run"))
    corpus = open_corpus(text_folder(tmp_path / "text"), subject, 32)
    sub = sub_dimensions(subject.transformer, 1, "attention")

    def score() -> dict[str, float]:
        return {"task": 0.25 if "route" in vars(sub) else 1.0}

    record = knockout(subject, corpus, KnockoutOptions(tokens=64, layers=(1,), kinds=("removed",)), score)
    assert record["baseline"]["tasks"] == {"task": 1.0}
    assert {row["tasks"]["task"]["delta"] for row in record["effects"] if row["component"] == "attention"} == {-0.75}
    assert {row["tasks"]["task"]["delta"] for row in record["effects"] if row["component"] == "ffn"} == {0.0}


def test_correlation_of_known_numbers() -> None:
    rows = [
        {"layer": layer, "component": "ffn", "shared": False, "kind": "removed", "share": share, "delta_nll": change}
        for layer, changes in ((0, (1, 2, 4)), (1, (30, 20, 10)))
        for share, change in zip((0.1, 0.2, 0.3), changes, strict=True)
    ]
    rows.append({"layer": 0, "component": "ffn", "shared": True, "kind": "removed", "share": 1.0, "delta_nll": 99})
    found = study.correlation(rows, "removed")
    assert found["all"]["n"] == 6
    assert found["within_layer"] == {"spearman": pytest.approx(0.0), "groups": 2}  # +1 and -1
    assert study._correlate(rows[:3])["spearman"] == pytest.approx(1)
    assert study._correlate(rows[:3])["pearson"] == pytest.approx(np.corrcoef([1, 2, 3], [1, 2, 4])[0, 1])
    assert study._correlate(rows[:2])["pearson"] is None
    assert study._ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0, 1.5, 3]


def test_bad_requests_are_named(tmp_path: Path) -> None:
    subject = subject_of(native(tmp_path / "run"))
    corpus = open_corpus(text_folder(tmp_path / "text"), subject, 32)
    with pytest.raises(UserError, match=r"--knockout-layers 7: the model has layers 0 .. 1"):
        knockout(subject, corpus, KnockoutOptions(layers=(7,)))
    with pytest.raises(UserError, match="--interventions dropped: give some of removed, banned, forced"):
        knockout(subject, corpus, KnockoutOptions(kinds=("dropped",)))
    dense = subject_of(hf_folder(llama(), tmp_path / "llama"))
    with pytest.raises(UserError, match="has no sub-dimensions; give a MoHD checkpoint"):
        knockout(dense, corpus, KnockoutOptions())
