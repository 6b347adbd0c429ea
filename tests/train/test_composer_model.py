"""The ComposerModel: which loss is minimized, what is logged, how validation is weighted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mohd_train.config.plan import ModelPlan, SubDimPlan
from mohd_train.model.count import count
from mohd_train.model.llama import Transformer
from mohd_train.train.composer_model import MoHDComposerModel

PART = SubDimPlan(sub_dims=8, top_k=4, shared=3, width=4)


def make(part: SubDimPlan | None = PART) -> MoHDComposerModel:
    plan = ModelPlan(
        name="mini", base_hidden_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_seq_len=16, rope_theta=10000.0, rms_norm_eps=1e-5,
        initializer_range=0.5, attention=part, ffn=part,
    )  # fmt: skip
    return MoHDComposerModel(Transformer(plan, seed=1), count(plan).flops_per_token)


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (samples, 16))
    return {"input_ids": ids, "labels": ids.clone(), "domain": torch.zeros(samples, dtype=torch.int64)}


def test_total_is_cross_entropy_plus_balance() -> None:
    model, batch = make(), batch_of(3)
    losses = model.loss(model(batch), batch)
    assert set(losses) == {"total", "cross_entropy", "balance"}  # with "total" there, Composer minimizes it alone
    assert losses["balance"] > 0
    assert torch.equal(losses["total"], losses["cross_entropy"] + losses["balance"])
    logits = model.eval_forward(batch)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(losses["cross_entropy"], expected)


def test_dense_model_has_no_balance_loss_and_trains() -> None:
    model, batch = make(None), batch_of(2)
    losses = model.loss(model(batch), batch)
    assert losses["balance"] == 0
    losses["total"].mul_(0.5).backward()  # as Composer does, in place
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_routing_of_a_step_holds_no_graph() -> None:
    model = make()
    out = model(batch_of(2))
    assert len(out.routing) == 2
    for layer in out.routing:
        assert not layer.attention.weights.requires_grad
        assert not layer.ffn.scores.requires_grad


def test_validation_weighs_every_token_the_same() -> None:
    model = make()
    metrics = model.get_metrics(is_train=False)
    batches, losses = [batch_of(4), batch_of(1)], []
    with torch.no_grad():
        for batch in batches:
            for metric in metrics.values():
                model.update_metric(batch, model.eval_forward(batch), metric)
            losses += [model(batch).cross_entropy] * len(batch["input_ids"])
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(metrics["LanguageCrossEntropy"].compute(), mean)
    torch.testing.assert_close(metrics["LanguagePerplexity"].compute(), mean.exp())
    assert model.get_metrics(is_train=True) == {}


def test_flops_count_three_forward_passes() -> None:
    model = make()
    assert model.flops_per_batch(batch_of(5)) == 3 * model.flops_per_token * 5 * 16
    assert make(None).flops_per_token > 0


@pytest.mark.parametrize("name", ["router.centroids"])
def test_cross_entropy_reaches_the_router(name: str) -> None:
    model, batch = make(), batch_of(2)
    model(batch).cross_entropy.backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith(name)]
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
