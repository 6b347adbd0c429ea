"""Routing statistics, the realized mix, and the words of the progress line."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from composer.metrics.nlp import LanguageCrossEntropy
from train.test_composer_model import PART, batch_of, make

from mohd_train.train.callbacks import DomainMix, Progress, RoutingStatistics, ValidationTotal
from mohd_train.train.callbacks.routing_statistics import selection_entropy
from mohd_train.utils.text import duration, short


class Collector:
    """Stands in for Composer's logger."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        self.metrics |= metrics


def state_at(batch: int, /, **values: Any) -> SimpleNamespace:
    return SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=batch)), device=DeviceCPU(), **values)


def test_entropy_is_one_when_balanced_and_zero_when_collapsed() -> None:
    assert selection_entropy(torch.tensor([9.0, 9, 9, 2, 2, 2, 2, 2]), PART) == pytest.approx(1.0)
    assert selection_entropy(torch.tensor([9.0, 9, 9, 0, 10, 0, 0, 0]), PART) == pytest.approx(0.0)


def test_routing_statistics_are_over_all_microbatches() -> None:
    model, logger = make(), Collector()
    statistics = RoutingStatistics(model.model.plan, interval=5)
    batches, outputs = [batch_of(2), batch_of(3)], []
    statistics.before_train_batch(state_at(4), logger)
    for batch in batches:
        outputs.append(model(batch))
        statistics.after_forward(state_at(4, outputs=outputs[-1]), logger)
    statistics.batch_end(state_at(5), logger)
    assert len(logger.metrics) == 2 * 2 * (8 + 8 + 2)  # layers x components x (shares, scores, entropy and balance)
    key = "routing/layer1/ffn"
    shares = [logger.metrics[f"{key}/share/{i}"] for i in range(8)]
    assert shares[:3] == [1.0, 1.0, 1.0]
    assert sum(shares) == pytest.approx(4)
    indices = torch.cat([out.routing[1].ffn.indices for out in outputs])
    assert shares == pytest.approx((indices[:, :, None] == torch.arange(8)).any(1).double().mean(0).tolist())
    assert sum(logger.metrics[f"{key}/score/{i}"] for i in range(8)) == pytest.approx(1)
    balance = torch.stack([out.routing[1].ffn.balance_loss for out in outputs]).mean()
    assert logger.metrics[f"{key}/balance_loss"] == pytest.approx(float(balance))


def test_routing_statistics_are_quiet_in_between() -> None:
    model, logger = make(), Collector()
    statistics = RoutingStatistics(model.model.plan, interval=5)
    statistics.after_forward(state_at(2, outputs=model(batch_of(1))), logger)
    statistics.batch_end(state_at(3), logger)
    assert logger.metrics == {}


def test_out_of_memory_retry_counts_once() -> None:
    model, logger = make(), Collector()
    statistics = RoutingStatistics(model.model.plan, interval=1)
    out = model(batch_of(2))
    for _ in range(2):  # the first attempt ran out of memory after its forward pass
        statistics.before_train_batch(state_at(0), logger)
        statistics.after_forward(state_at(0, outputs=out), logger)
    statistics.batch_end(state_at(1), logger)
    assert logger.metrics["routing/layer0/ffn/balance_loss"] == pytest.approx(float(out.routing[0].ffn.balance_loss))


def test_mix_counts_over_batches_and_sessions() -> None:
    logger, mix = Collector(), DomainMix(["cc", "wiki"])
    for domains in ([0, 0, 0, 1], [0, 0, 0, 0]):
        ids = torch.zeros(4, 10, dtype=torch.int64)
        mix.batch_end(state_at(1, batch={"input_ids": ids, "domain": torch.tensor(domains)}), logger)
    assert logger.metrics == {"mix/cc": 7 / 8, "tokens/cc": 70, "mix/wiki": 1 / 8, "tokens/wiki": 10}
    later = DomainMix(["arxiv", "cc", "wiki"])
    later.load_state_dict(mix.state_dict())
    assert later.tokens.tolist() == [0, 70, 10]


def test_validation_total_weighs_tokens_not_domains() -> None:
    metrics = {}
    for name, (loss, tokens) in {"cc": (2.0, 300), "wiki": (4.0, 100)}.items():
        metric = LanguageCrossEntropy()
        metric.sum_loss, metric.total_items = torch.tensor(loss * tokens), torch.tensor(tokens)
        metrics[name] = {"LanguageCrossEntropy": metric}
    logger, total = Collector(), ValidationTotal()
    total.eval_after_all(state_at(1, eval_metrics=metrics), logger)
    assert logger.metrics["metrics/eval/LanguageCrossEntropy"] == pytest.approx(2.5)
    assert logger.metrics["metrics/eval/LanguagePerplexity"] == pytest.approx(12.182494)
    assert total.latest == pytest.approx({"all": 2.5, "cc": 2.0, "wiki": 4.0})


def test_numbers_and_times_read_short() -> None:
    assert [short(x) for x in (0, 12, 1234, 52_428_800_000)] == ["0", "12", "1.23k", "52.4B"]
    assert [duration(x) for x in (5, 65, 3700, 93784)] == ["5s", "1m 05s", "1h 01m", "1d 02h"]


def test_progress_off_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(40, ValidationTotal(), stream=stream)
    assert not progress.bar
    assert progress.interval == 2
    losses = {"loss/train/cross_entropy": 3.25, "loss/train/balance": 0.04}
    for batch in range(1, 5):
        stamp = SimpleNamespace(
            batch=SimpleNamespace(value=batch),
            token=SimpleNamespace(value=batch * 1000),
            total_wct=SimpleNamespace(total_seconds=lambda batch=batch: batch * 0.5),
        )
        state = SimpleNamespace(timestamp=stamp, total_loss_dict=losses)
        progress.batch_end(state, Collector())
    last = stream.getvalue().splitlines()[-1]
    assert last == "4/40 ba · loss 3.2500 · balance 0.0400 · 2k tok/s · 18s left"
    assert Progress(40, ValidationTotal(), bar=False, stream=stream).interval is None
