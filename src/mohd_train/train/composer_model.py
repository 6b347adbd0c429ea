"""The ComposerModel around the transformer: what Composer's Trainer needs to know, and nothing of the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.metrics.nlp import LanguageCrossEntropy, LanguagePerplexity
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from mohd_train.model.llama import IGNORE_INDEX, LayerRouting, Transformer
from mohd_train.model.mohd import Routing

Batch = Mapping[str, Tensor]

# A backward pass costs two forward passes: one product for the input's gradient, one for the weight's.
FORWARD_PASSES_PER_STEP = 3


@dataclass
class StepOutput:
    """One microbatch's losses (scalars, float32) and its routing, detached from the graph."""

    cross_entropy: Tensor
    balance_loss: Tensor
    routing: list[LayerRouting] = field(default_factory=list)


def _detach(routing: Routing | None) -> Routing | None:
    if routing is None:
        return None
    return Routing(routing.indices, routing.scores.detach(), routing.weights.detach(), routing.balance_loss.detach())


class MoHDComposerModel(ComposerModel):
    """Language modelling with MoHD's two losses (eq. 18).

    The losses are computed inside ``Transformer.forward``, since FSDP gathers a parameter only around the forward
    pass of the module that holds it, and Composer wraps ``self.model``, not this class.

    Args:
        model: the transformer.
        flops_per_token: forward FLOPs of one token (``model.count.count(plan).flops_per_token``).
    """

    def __init__(self, model: Transformer, flops_per_token: int) -> None:
        super().__init__()
        self.model = model
        self.flops_per_token = flops_per_token

    def forward(self, batch: Batch) -> StepOutput:
        """The losses of ``batch``: input_ids and labels, int64 [B, T]; labels equal the input (the shift is in the
        loss)."""
        out = self.model(batch["input_ids"], labels_BT=batch["labels"], logits=False)
        routing = [LayerRouting(_detach(layer.attention), _detach(layer.ffn)) for layer in out.routing]
        return StepOutput(out.cross_entropy, out.balance_loss, routing)

    def loss(  # type: ignore[override]  # Composer takes a mapping too, and says so in its manual alone
        self, outputs: StepOutput, batch: Batch
    ) -> dict[str, Tensor]:
        """``total`` is minimized. Without that key Composer would minimize the sum of all entries."""
        return {
            "total": outputs.cross_entropy + outputs.balance_loss,
            "cross_entropy": outputs.cross_entropy,
            "balance": outputs.balance_loss,
        }

    def eval_forward(self, batch: Batch, outputs: Any = None) -> Tensor:
        """Logits [B, T, V]; ``outputs`` of a training forward hold none and are not used."""
        logits = self.model(batch["input_ids"], balance=False).logits
        assert logits is not None
        return logits

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Validation metrics, weighted by token. Training has none: its losses are logged as they are."""
        if is_train:
            return {}
        return {
            "LanguageCrossEntropy": LanguageCrossEntropy(ignore_index=IGNORE_INDEX),
            "LanguagePerplexity": LanguagePerplexity(ignore_index=IGNORE_INDEX),
        }

    def update_metric(self, batch: Batch, outputs: Tensor, metric: Metric) -> None:
        """Position t is scored on the token at t + 1; the last one has no target."""
        targets = torch.full_like(batch["labels"], IGNORE_INDEX)
        targets[:, :-1] = batch["labels"][:, 1:]
        metric.update(outputs, targets)

    def flops_per_batch(self, batch: Batch) -> int:
        """Model FLOPs of one optimizer step on ``batch`` (this device's), for SpeedMonitor's MFU; recomputation is not
        counted."""
        return FORWARD_PASSES_PER_STEP * self.flops_per_token * batch["input_ids"].numel()
