"""The mixture-of-experts baseline: equal to its experts called one by one, as large as MoHD, and trained as the rest is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.plans import small_plan
from transformers import DynamicCache

from mohd_train.config.catalogue import BASES, compose
from mohd_train.config.load import load_model_plan
from mohd_train.config.plan import ModelPlan
from mohd_train.config.schema import ExpertsConfig, SubDimensionConfig
from mohd_train.errors import UserError
from mohd_train.model.count import count, count_parameters
from mohd_train.model.llama import Transformer
from mohd_train.model.moe import Experts
from mohd_train.model.mohd import ForwardContext, swiglu

SHAPES = {"few choices": (6, 2, 1), "many choices": (12, 4, 1), "no shared": (5, 3, 0), "all": (3, 3, 1)}


def moe_plan(shape: tuple[int, int, int] = (12, 4, 1), **mohd) -> ModelPlan:
    return small_plan("dense", experts=ExpertsConfig(*shape), fusion="none", **mohd)


def layer(plan: ModelPlan, kernels: str):
    """The parts of one FFN in float64 with a router that has preferences, as a function of x, and its parameters."""
    torch.manual_seed(1)
    wide, d = plan.ffn_width, plan.hidden_size
    gate, up = (torch.nn.Linear(d, wide, bias=False, dtype=torch.float64) for _ in range(2))
    down = torch.nn.Linear(wide, d, bias=False, dtype=torch.float64)
    experts = Experts(plan.experts, plan, kernels, 1).double()
    torch.nn.init.normal_(experts.router.centroids)
    context = ForwardContext(rope=(torch.empty(0), torch.empty(0)))

    def run(x):
        return experts(x, x, (gate, up), swiglu, down, context)

    return run, [gate.weight, up.weight, down.weight, experts.router.centroids]


def one_by_one(x, weights, plan: ModelPlan):
    """``x + sum_i w_i E_i(x)``, token by token and expert by expert."""
    gate, up, down, centroids = weights
    part, rows = plan.experts, []
    slices = [slice(i * part.width, (i + 1) * part.width) for i in range(part.sub_dims)]
    for token in x:
        scores = torch.softmax(centroids @ token, 0)
        order = sorted(range(len(scores)), key=lambda i: -scores[i].item())[: part.top_k - part.shared]
        mass = sum(scores[i] for i in order)
        chosen = dict.fromkeys(range(part.shared), 1.0)
        chosen |= {i + part.shared: scores[i] * len(order) / mass for i in order}
        y = token.clone()
        for i, weight in chosen.items():
            hidden = F.silu(gate[slices[i]] @ token) * (up[slices[i]] @ token)
            y = y + weight * (down[:, slices[i]] @ hidden)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("kernels", ["reference", "grouped"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_its_experts_called_one_by_one_with_gradients(shape, kernels) -> None:
    plan = moe_plan(shape)
    run, weights = layer(plan, kernels)
    x = torch.randn(37, plan.hidden_size, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(37, plan.hidden_size, dtype=torch.float64)
    y, routing = run(x)
    found = torch.autograd.grad((y * probe).sum(), [x, *weights])
    expected_y = one_by_one(x, weights, plan)
    expected = torch.autograd.grad((expected_y * probe).sum(), [x, *weights])
    torch.testing.assert_close(y, expected_y)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (routing.indices[:, : plan.experts.shared] == torch.arange(plan.experts.shared)).all()
    with torch.no_grad():  # the path of a few tokens, as in decoding
        torch.testing.assert_close(run(x[:3])[0], expected_y[:3])


def test_over_the_full_width_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mohd_train.kernels.ops.choose_path", lambda *_: "masked")
    test_equals_its_experts_called_one_by_one_with_gradients((12, 4, 1), "grouped")


def test_projections_that_are_called_as_modules_give_the_same() -> None:
    plan = moe_plan()
    model = Transformer(plan, seed=3)
    tokens = torch.randint(0, plan.vocab_size, (2, 11))
    plain = model(tokens).logits
    for block in model.blocks:
        block.ffn.up_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(tokens).logits, plain)


def test_one_expert_of_one_is_llama() -> None:
    """Its weight is 1 whatever the router says, and it has all F dims."""
    plan = moe_plan((1, 1, 0))
    moe, dense = Transformer(plan, seed=5), Transformer(small_plan("dense"), seed=5)
    tokens = torch.randint(0, plan.vocab_size, (2, 9))
    torch.testing.assert_close(moe(tokens).logits, dense(tokens).logits)


def test_a_cache_changes_nothing() -> None:
    model = Transformer(moe_plan(), seed=2).double().eval()
    tokens = torch.randint(0, 97, (2, 12))
    whole, cache = model(tokens).logits, DynamicCache()
    with torch.inference_mode():
        parts = [model(tokens[:, :7], cache=cache).logits]
        parts += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(7, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_the_balance_loss_is_beta_where_experts_are_used_evenly_and_more_where_not() -> None:
    plan = moe_plan((8, 2, 1), balance_loss_weight=0.5)
    run, weights = layer(plan, "grouped")
    x = torch.randn(64, plan.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        weights[3].zero_()  # every choice a tie: scores are even, the first of them gets all tokens
        assert run(x)[1].balance_loss.item() == pytest.approx(0.5)
        weights[3][0] = 10 * x.mean(0)
        skewed = run(x + 3 * x.mean(0))[1]
    assert skewed.balance_loss.item() > 0.5


def test_padding_does_not_count_in_the_balance_loss() -> None:
    model = Transformer(moe_plan(), seed=2)
    tokens, mask = torch.randint(0, 97, (1, 16)), torch.ones(1, 16)
    mask[:, 12:] = 0
    other = torch.where(mask.bool(), tokens, (tokens + 1) % 97)
    assert model(tokens, mask).balance_loss.item() == pytest.approx(model(other, mask).balance_loss.item(), rel=1e-6)


def test_a_step_reaches_every_parameter() -> None:
    model = Transformer(moe_plan((4, 3, 1)), seed=1)
    tokens = torch.randint(0, 97, (4, 32))
    out = model(tokens, labels_BT=tokens, logits=False)
    (out.cross_entropy + out.balance_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_random_routing_is_the_same_for_a_token_wherever_it_is_batched() -> None:
    model = Transformer(moe_plan(routing="random"), seed=1)
    tokens = torch.randint(0, 97, (2, 8))
    both, alone = model(tokens), model(tokens[1:])
    for pair in zip(both.routing, alone.routing, strict=True):
        first, second = (routing.ffn.indices for routing in pair)
        assert (first[8:] == second).all()
    assert both.balance_loss == 0


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("base", BASES)
def test_it_is_as_large_as_mohd(root, base, size) -> None:
    files = [root / "configs" / "model" / f"{base}.yaml", root / "configs" / "moe" / f"moe-x{size}.yaml"]
    moe, mohd = count(load_model_plan([str(file) for file in files])), count(compose(base, f"x{size}"))
    assert moe.activated == mohd.activated
    assert abs(moe.total / mohd.total - 1) < 0.05


def test_counts_are_the_models() -> None:
    for plan in (moe_plan(), dataclasses.replace(moe_plan((6, 2, 1)), name="other")):
        counts, parts = count(plan), count_parameters(plan)
        for part, size in parts.items():
            assert getattr(counts, part) == size, part
        assert counts.activated == count(small_plan("dense")).activated


def test_attention_may_have_sub_dimensions() -> None:
    plan = small_plan("dense", attention=SubDimensionConfig(8, 4, 3), experts=ExpertsConfig(6, 2, 1))
    assert list(plan.routed) == ["attention", "ffn"]
    assert plan.components == (plan.attention,)
    out = Transformer(plan, seed=1)(torch.randint(0, 97, (1, 8)))
    assert [part.indices.shape for part in out.routing[0]] == [(8, 4), (8, 2)]


@pytest.mark.parametrize(
    ("mohd", "said"),
    [
        ({"experts": ExpertsConfig(4, 5, 1)}, "mohd.experts.top_k is 5; it must lie in 1 .. mohd.experts.num_experts = 4"),
        ({"experts": ExpertsConfig(8, 2, 2)}, "mohd.experts.shared_experts is 2; it must lie in 0 .. mohd.experts.top_k - 1"),
        ({"experts": ExpertsConfig(8, 5, 1)}, "does not divide model.intermediate_size = 96"),
        ({"experts": ExpertsConfig(8, 0, 0)}, "mohd.experts.top_k"),
        ({"experts": ExpertsConfig(8, 4, 1), "ffn": SubDimensionConfig(8, 4, 3)}, "mohd.experts and mohd.ffn exclude each other"),
        ({"experts": ExpertsConfig(8, 4, 1), "gate_input": True}, "mohd.gate_input is for sub-dimensions"),
    ],
)  # fmt: skip
def test_what_no_model_can_be_built_from_is_refused(mohd, said) -> None:
    with pytest.raises(UserError) as error:
        small_plan("dense", **mohd)
    assert said in str(error.value)


def test_the_plan_survives_a_checkpoint_and_an_edited_one_is_refused() -> None:
    plan = moe_plan()
    assert ModelPlan.from_dict(plan.to_dict()).check() == plan
    edited = dataclasses.replace(plan, experts=dataclasses.replace(plan.experts, width=5))
    with pytest.raises(UserError, match=r"experts\.width is 5; it must be intermediate_size / top_k = 24"):
        edited.check()
    older = {key: value for key, value in plan.to_dict().items() if key != "experts"}
    assert ModelPlan.from_dict(older).experts is None


def test_autocast_keeps_the_streams_dtype() -> None:
    model = Transformer(moe_plan(), seed=1)
    tokens = torch.randint(0, 97, (1, 16))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens)
    assert low.hidden.dtype == torch.float32
    torch.testing.assert_close(low.logits.float(), model(tokens).logits, atol=0.05, rtol=0.1)
