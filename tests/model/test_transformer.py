"""What `the mathematics` says must hold exactly: see the docstrings of mohd_train.model."""

from __future__ import annotations

import pytest
import torch
from support.plans import SETTINGS, small_plan
from torch import Tensor, nn
from transformers import DynamicCache

from mohd_train.config.plan import SubDimPlan
from mohd_train.model.count import PARTS, count, count_parameters
from mohd_train.model.init import initializer
from mohd_train.model.llama import Transformer
from mohd_train.model.mohd import ForwardContext, SubDimensions

ALL = ["dense", *SETTINGS]
NO_ROPE = (torch.ones(1, 1, 1, 16, dtype=torch.float64), torch.zeros(1, 1, 1, 16, dtype=torch.float64))


def scrambled(model: Transformer) -> Transformer:
    """Fusion away from the identity and norms away from one, so that a wrong index shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fusion." in name or parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
            if "centroids" in name:
                parameter *= 20
    return model


def dense_masked(x: Tensor, weight_in: list[nn.Linear], weight_out: nn.Linear, sub: SubDimensions, inner) -> Tensor:
    """One component token by token, straight from eqs. 3-9, without a kernel."""
    plan: SubDimPlan = sub.plan
    rows = []
    logits = x @ sub.router.centroids.T
    scores = logits.softmax(-1)
    for t in range(len(x)):
        best = sorted(range(plan.shared, plan.sub_dims), key=lambda i: (-logits[t, i].item(), i))
        active = sorted([*range(plan.shared), *best[: plan.specialized]])
        g = torch.zeros(plan.sub_dims, dtype=x.dtype)
        g[active] = scores[t, active]
        alpha = {
            "sum_to_active": plan.top_k / g.sum(),
            "sum_to_all": plan.sub_dims / g.sum(),
            "subdims": plan.sub_dims,
            "gate_mass": plan.sub_dims * g.sum(),
            "none": 1.0,
        }[sub.model_plan.scaling]
        mask = (g > 0).to(x.dtype)
        sparse = (x[t].view(plan.sub_dims, plan.width) * (g if sub.model_plan.gate_input else mask)[:, None]).flatten()
        h = inner([linear.weight @ sparse for linear in weight_in])
        y = (weight_out.weight @ h).view(plan.sub_dims, plan.width)
        z = y * (alpha * g)[:, None]
        if sub.fusion.within is not None:
            z = torch.stack([sub.fusion.within[k] @ z[k] for k in range(plan.sub_dims)])
        if sub.fusion.blocks is not None:
            z = torch.stack([sub.fusion.blocks[j] @ z[:, j] for j in range(plan.width)], dim=1)
        rows.append(z.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize(
    "readings",
    [
        {},
        {"scaling": "subdims", "fusion": "none"},
        {"scaling": "none", "fusion": "monarch", "gate_input": True},
        {"scaling": "sum_to_all"},
        {"scaling": "gate_mass", "gate_input": True},
    ],
)
def test_feed_forward_equals_the_equations(setting: str, readings: dict) -> None:
    model = scrambled(Transformer(small_plan(setting, **readings)).double())
    ffn = model.blocks[0].ffn
    x, residual = torch.randn(2, 7, ffn.gate_proj.in_features, dtype=torch.float64).expand(2, 2, 7, -1).clone()
    out, _ = ffn(x, residual, ForwardContext(NO_ROPE))

    def inner(parts: list[Tensor]) -> Tensor:
        return torch.nn.functional.silu(parts[0]) * parts[1]

    expected = residual.flatten(0, 1) + dense_masked(
        x.flatten(0, 1), [ffn.gate_proj, ffn.up_proj], ffn.down_proj, ffn.sub_dimensions, inner
    )
    torch.testing.assert_close(out.flatten(0, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_attention_of_a_single_token_equals_the_equations(setting: str) -> None:
    model = scrambled(Transformer(small_plan(setting)).double())
    attention = model.blocks[0].attention
    x, residual = torch.randn(2, 5, 1, attention.q_proj.in_features, dtype=torch.float64)
    out, _ = attention(x, residual, ForwardContext(NO_ROPE))

    def inner(parts: list[Tensor]) -> Tensor:  # one token attends to itself: the values, repeated over the query groups
        return parts[2].view(2, 1, 16).expand(2, 2, 16).flatten()

    expected = residual[:, 0] + dense_masked(
        x[:, 0],
        [attention.q_proj, attention.k_proj, attention.v_proj],
        attention.o_proj,
        attention.sub_dimensions,
        inner,
    )
    torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=1e-10)


def test_fully_active_unscaled_model_equals_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = Transformer(small_plan("100"), seed=5).double()
    dense = Transformer(small_plan("dense"), seed=5).double()
    dense.load_state_dict({k: v for k, v in routed.state_dict().items() if k in dense.state_dict()})
    monkeypatch.setattr("mohd_train.model.mohd.activation_weights", lambda s, i, _: torch.ones_like(i, dtype=s.dtype))
    ids = torch.randint(97, (2, 11))
    torch.testing.assert_close(routed(ids).logits, dense(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ALL)
def test_no_token_sees_a_later_one_or_another_sequence(setting: str) -> None:
    model = scrambled(Transformer(small_plan(setting)).double())
    ids = torch.randint(97, (3, 12))
    logits = model(ids).logits
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 97
    other = model(changed).logits
    torch.testing.assert_close(other[0, :7], logits[0, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(other[1:], logits[1:], rtol=0, atol=1e-12)
    assert not torch.allclose(other[0, 7:], logits[0, 7:])
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], logits[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ALL)
def test_decoding_with_a_cache_equals_the_full_forward(setting: str) -> None:
    model = scrambled(Transformer(small_plan(setting)).double())
    ids = torch.randint(97, (2, 13))
    full = model(ids).logits
    cache, pieces = DynamicCache(), []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 13)):  # chunks, and single tokens
        pieces.append(model(ids[:, start:end], cache=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ["dense", "x2"])
def test_padding_changes_nothing_for_real_tokens(setting: str) -> None:
    model = scrambled(Transformer(small_plan(setting)).double())
    ids = torch.randint(97, (1, 9))
    plain = model(ids)
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    padded = model(left, mask, position_ids=positions)
    assert torch.isfinite(padded.logits).all()
    torch.testing.assert_close(padded.logits[:, 4:], plain.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(padded.balance_loss, plain.balance_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_cross_entropy_is_the_shifted_mean_and_ignores_minus_100(setting: str) -> None:
    model = Transformer(small_plan(setting)).double()
    ids = torch.randint(97, (2, 10))
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels_BT=labels)
    log_p = out.logits.log_softmax(-1)
    terms = [-log_p[b, t - 1, ids[b, t]] for b in range(2) for t in range(1, 10) if labels[b, t] != -100]
    torch.testing.assert_close(out.cross_entropy, torch.stack(terms).mean(), rtol=1e-12, atol=0)
    assert model(ids, labels_BT=labels, logits=False).logits is None


def test_every_parameter_gets_a_gradient() -> None:
    model = Transformer(small_plan("x2", fusion="monarch"))
    out = model(torch.randint(97, (4, 16)), labels_BT=torch.randint(97, (4, 16)))
    (out.cross_entropy + out.balance_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("setting", ALL)
@pytest.mark.parametrize("fusion", ["grouped", "monarch", "none"])
def test_counts_equal_the_model_built(setting: str, fusion: str) -> None:
    plan = small_plan(setting, fusion=fusion)
    counts, built = count(plan), count_parameters(plan)
    assert {part: getattr(counts, part) for part in (*PARTS, "attention", "ffn")} == built
    assert counts.parameters == sum(p.numel() for p in Transformer(plan).parameters())


def test_initial_weights_depend_on_the_seed_and_the_name_alone() -> None:
    one, two = Transformer(small_plan("x2"), seed=1), Transformer(small_plan("x2", fusion="none"), seed=1)
    torch.randn(5)
    for name, parameter in two.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name)), name
    other = Transformer(small_plan("x2"), seed=2)
    assert not torch.equal(other.head.weight, one.head.weight)
    assert one.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_torch_initialization_is_that_of_torch() -> None:
    """``init: torch``: Linear and centroids from U(+-1/sqrt(fan_in)), the embedding from N(0, 1), as torch builds them."""
    model = Transformer(small_plan("x2", model={"init": "torch", "vocab_size": 997}), seed=1)
    ones = {"attention_norm.weight", "ffn_norm.weight", "norm.weight"}
    for name, parameter in model.named_parameters():
        leaf = name.split(".", 2)[-1] if name.startswith("blocks") else name
        if leaf in ones:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif ".fusion." in name:
            assert torch.equal(parameter, torch.eye(8)[:, :, None].expand(8, 8, 16)), name
        elif name == "embedding.weight":
            assert parameter.std().item() == pytest.approx(1, rel=0.02)
            assert parameter.abs().max() > 3
        else:
            bound = parameter.shape[1] ** -0.5
            assert parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.06), name


@pytest.mark.parametrize("init", ["normal", "torch"])
def test_a_model_built_on_meta_gets_the_same_weights_module_by_module(init: str) -> None:
    """What FSDP does with ``param_init_fn``: memory for one module, then its parameters, in any order."""
    plan = small_plan("x2", fusion="monarch", model={"init": init}, router_init_std=0.1)
    whole = Transformer(plan, seed=5)
    with torch.device("meta"):
        model = Transformer(plan)
    fill = initializer(model, plan, 5)
    for module in reversed(list(model.modules())):
        fill(module.to_empty(device="cpu", recurse=False))
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
