from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.plans import small_plan

from mohd_train.config.load import load_model_plan
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.hf.configuration import MoHDConfig
from mohd_train.model.llama import Transformer
from mohd_train.model.mohd import select
from mohd_train.model.random_routing import random_ranks, token_keys


def chosen(model: Transformer, ids: torch.Tensor, **kwargs: object) -> list[torch.Tensor]:
    routing = model(ids, **kwargs).routing
    return [part.indices for layer in routing for part in (layer.attention, layer.ffn)]


def test_random_choice_is_uniform_and_independent_between_components() -> None:
    keys = token_keys(torch.randint(97, (8, 512)), torch.arange(512)[None])
    picks = [select(random_ranks(keys, 8, component), 4, 3)[:, 3] for component in range(4)]
    for pick in picks:
        share = torch.bincount(pick, minlength=8).double() / len(pick)
        assert share[:3].sum() == 0
        # 4096 draws over 5: three standard deviations are 0.019
        assert (share[3:] - 0.2).abs().max() < 0.025
    for a, b in pairwise(picks):
        assert abs((a == b).double().mean().item() - 0.2) < 0.025


def test_neither_position_nor_id_alone_decides() -> None:
    keys = token_keys(torch.full((1, 4096), 5), torch.arange(4096)[None])
    same_id = select(random_ranks(keys, 8, 0), 4, 3)[:, 3]
    keys = token_keys(torch.arange(4096)[None], torch.full((1, 4096), 5))
    same_place = select(random_ranks(keys, 8, 0), 4, 3)[:, 3]
    for pick in (same_id, same_place):
        assert (torch.bincount(pick, minlength=8)[3:] / 4096 - 0.2).abs().max() < 0.025


def test_choice_depends_on_no_weight_and_no_other_token() -> None:
    plan = small_plan("x2", routing="random")
    ids = torch.randint(97, (3, 11))
    first, second = Transformer(plan, seed=1), Transformer(plan, seed=2)
    for a, b in zip(chosen(first, ids), chosen(second, ids), strict=True):
        assert torch.equal(a, b)
    alone = chosen(first, ids[1:2, :7])
    for whole, part in zip(chosen(first, ids), alone, strict=True):
        assert torch.equal(whole.view(3, 11, -1)[1, :7], part)


def test_decoding_with_a_cache_equals_the_whole() -> None:
    from transformers import DynamicCache

    model = Transformer(small_plan("x2", routing="random"), seed=1).double()
    ids = torch.randint(97, (2, 9))
    cache, logits = DynamicCache(), []
    for t in range(9):
        logits.append(model(ids[:, t : t + 1], cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits)


def test_centroids_still_learn_to_weigh_and_there_is_no_balance_loss() -> None:
    model = Transformer(small_plan("x2", routing="random"), seed=1)
    ids = torch.randint(97, (2, 9))
    out = model(ids, labels_BT=ids)
    assert out.balance_loss.item() == 0
    out.cross_entropy.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith("router.centroids"))


@pytest.mark.parametrize("kernels", ["grouped"])
def test_kernels_agree(kernels: str) -> None:
    plan = small_plan("x2", routing="random")
    ids = torch.randint(97, (2, 9))
    reference, other = (Transformer(plan, kernels=k, seed=1).double() for k in ("reference", kernels))
    torch.testing.assert_close(other(ids).logits, reference(ids).logits)


def test_plan_and_hugging_face_config_carry_it() -> None:
    plan = small_plan("x2", routing="random")
    assert ModelPlan.from_dict(plan.to_dict()) == plan
    assert MoHDConfig.from_plan(plan).to_plan() == plan
    old = plan.to_dict()
    del old["routing"]  # checkpoints from before the key
    assert ModelPlan.from_dict(old).routing == "learned"
    assert plan.differences(small_plan("x2")) == ["routing: random here, learned there"]


def test_unknown_routing_is_refused(root: object) -> None:
    with pytest.raises(UserError, match=r"mohd.routing is 'dice'; it must be one of learned, random"):
        load_model_plan([f"{root}/configs/model/tiny.yaml"], ["mohd.routing=dice"])
