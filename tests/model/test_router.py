from __future__ import annotations

import pytest
import torch
from support.plans import small_plan

from mohd_train.config.plan import SubDimPlan
from mohd_train.model.llama import Transformer
from mohd_train.model.mohd import activation_weights, balance_loss, select


def naive_select(row: list[float], top_k: int, shared: int) -> list[int]:
    order = sorted(range(shared, len(row)), key=lambda i: (-row[i], i))
    return sorted([*range(shared), *order[: top_k - shared]])


@pytest.mark.parametrize(("n", "k", "s"), [(8, 4, 3), (16, 12, 9), (8, 4, 0), (8, 4, 4), (4, 4, 3), (6, 6, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_is_shared_then_best_with_ties_to_the_lower_index(n: int, k: int, s: int, ties: bool) -> None:
    scores = torch.randn(200, n)
    if ties:
        scores = (scores * 2).round()
    assert select(scores, k, s).tolist() == [naive_select(row, k, s) for row in scores.tolist()]


def test_scaling_weights() -> None:
    scores = torch.rand(50, 8, dtype=torch.float64).softmax(-1)
    indices = select(scores, 4, 3)
    kept = activation_weights(scores, indices, "sum_to_active")
    torch.testing.assert_close(kept.sum(-1), torch.full((50,), 4.0, dtype=torch.float64))
    raw = activation_weights(scores, indices, "none")
    torch.testing.assert_close(
        kept / kept.sum(-1, keepdim=True), raw / raw.sum(-1, keepdim=True)
    )  # only the size changes
    uniform = torch.full((3, 8), 1 / 8)
    torch.testing.assert_close(activation_weights(uniform, indices[:3], "subdims"), torch.ones(3, 4))
    torch.testing.assert_close(activation_weights(uniform, indices[:3], "sum_to_active"), torch.ones(3, 4))
    torch.testing.assert_close(activation_weights(uniform, indices[:3], "sum_to_all"), torch.full((3, 4), 2.0))
    torch.testing.assert_close(activation_weights(uniform, indices[:3], "gate_mass"), torch.full((3, 4), 0.5))


PLAN = SubDimPlan(sub_dims=8, top_k=4, shared=3, width=8)


def test_balance_loss_is_beta_at_perfect_balance_and_grows_with_collapse() -> None:
    logits = torch.zeros(500, 8)
    logits[torch.arange(500), 3 + torch.arange(500) % 5] = 1e-4  # each specialized one chosen by a fifth of the tokens
    balanced = balance_loss(logits, select(logits, 4, 3), PLAN, 0.01)
    torch.testing.assert_close(balanced, torch.tensor(0.01), rtol=1e-4, atol=0)
    logits = torch.zeros(500, 8)
    logits[:, 5] = 30.0
    collapsed = balance_loss(logits, select(logits, 4, 3), PLAN, 0.01)
    torch.testing.assert_close(collapsed, torch.tensor(0.05))  # beta x (N - S)


def test_balance_loss_by_its_definition_with_padding() -> None:
    logits = torch.randn(40, 8, dtype=torch.float64)
    mask = torch.rand(40) > 0.3
    indices = select(logits, 4, 3)
    kept, chosen = logits[mask].softmax(-1), indices[mask][:, 3:]
    total = 0.0
    for i in range(3, 8):
        f = 5 / (1 * len(kept)) * (chosen == i).sum().item()
        total += f * (kept[:, i] / kept[:, 3:].sum(-1)).mean().item()
    assert balance_loss(logits, indices, PLAN, 0.5, mask).item() == pytest.approx(0.5 * total, rel=1e-12)


@pytest.mark.parametrize("count", ["selected", "highest"])
@pytest.mark.parametrize("scores", ["specialized", "all"])
def test_balance_loss_readings_by_their_equations(count: str, scores: str) -> None:
    """What f counts and what P averages, where three of seven are chosen: a loop over tokens and sub-dimensions."""
    plan = SubDimPlan(sub_dims=8, top_k=4, shared=1, width=8)
    logits = torch.randn(30, 8, dtype=torch.float64)
    indices = select(logits, 4, 1)
    s = logits.softmax(-1)
    total = 0.0
    for i in range(1, 8):
        if count == "selected":
            f = 7 / (3 * 30) * sum(i in row for row in indices.tolist())
        else:
            f = 7 / 30 * sum(max(range(1, 8), key=lambda j, row=row: row[j]) == i for row in logits.tolist())
        p = s[:, i] / (s[:, 1:].sum(-1) if scores == "specialized" else 1.0)
        total += f * p.mean().item()
    loss = balance_loss(logits, indices, plan, 0.3, count=count, scores=scores)
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-12)


def test_the_model_follows_its_balance_readings() -> None:
    ids = torch.randint(97, (2, 9))
    losses = {
        (count, scores): Transformer(small_plan("75", balance_count=count, balance_scores=scores), seed=1)(
            ids
        ).balance_loss
        for count in ("selected", "highest")
        for scores in ("specialized", "all")
    }
    assert len({round(loss.item(), 8) for loss in losses.values()}) == 4


@pytest.mark.parametrize(("setting", "model"), [("x2", "normal"), ("x4", "torch"), ("75", "normal")])
def test_router_init_std_is_that_of_the_logits_at_every_width(setting: str, model: str) -> None:
    plan = small_plan(setting, router_init_std=0.25, model={"hidden_size": 512, "init": model})
    router = Transformer(plan, seed=3).blocks[0].ffn.sub_dimensions.router
    x = torch.nn.functional.rms_norm(torch.randn(2000, plan.hidden_size), (plan.hidden_size,))
    assert router.logits(x).std(0).mean().item() == pytest.approx(0.25, rel=0.05)


def test_a_router_may_read_the_residual_stream() -> None:
    """Logits ``E h`` of the stream before the norm; the component itself still works on the normalized one."""
    model = Transformer(small_plan("x2", router_input="residual"), seed=1).double()
    ids = torch.randint(97, (2, 9))
    h = model.embedding(ids).flatten(0, 1)
    sub = model.blocks[0].attention.sub_dimensions
    scores = model(ids).routing[0].attention.scores
    torch.testing.assert_close(scores, (h @ sub.router.centroids.T).softmax(-1), rtol=1e-12, atol=0)
    normalized = Transformer(small_plan("x2"), seed=1).double()
    normalized.load_state_dict(model.state_dict())
    assert not torch.equal(normalized(ids).routing[0].attention.scores, scores)
    model(ids, labels_BT=ids).cross_entropy.backward()
    assert sub.router.centroids.grad.abs().sum() > 0


def test_balance_loss_stays_finite_when_shared_scores_take_everything() -> None:
    logits = torch.zeros(4, 8)
    logits[:, 0] = 500.0
    logits.requires_grad_()
    loss = balance_loss(logits, select(logits, 4, 3), PLAN, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["shared-only", "100"])
def test_no_choice_no_balance_loss(setting: str) -> None:
    out = Transformer(small_plan(setting))(torch.randint(97, (2, 9)))
    assert out.balance_loss.item() == 0


def test_balance_reduction() -> None:
    ids = torch.randint(97, (2, 9))
    total = Transformer(small_plan("x2"), seed=1)(ids).balance_loss
    mean = Transformer(small_plan("x2", balance_reduction="component_mean"), seed=1)(ids).balance_loss
    torch.testing.assert_close(total, mean * 4)  # two layers, two components


def test_router_works_in_float32_under_autocast() -> None:
    model = Transformer(small_plan("x2"))
    ids = torch.randint(97, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        routing = model(ids).routing[0].attention
    assert routing is not None
    assert routing.scores.dtype == torch.float32
    exact = model(ids).routing[0].attention
    torch.testing.assert_close(routing.scores, exact.scores)  # the first layer's input has not seen bfloat16 yet
