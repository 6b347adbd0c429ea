"""The data mix that was actually trained on, next to the planned one."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist


class DomainMix(Callback):
    """Logs ``mix/{domain}`` (share of the samples so far) and ``tokens/{domain}`` after every batch, over all ranks and
    sessions.

    Args:
        domains: names in the order that a batch's ``domain`` indexes.
    """

    def __init__(self, domains: list[str]) -> None:
        self.domains = domains
        self.tokens = torch.zeros(len(domains), dtype=torch.int64)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Counts the batch. Samples are of one length, so shares of samples are shares of tokens."""
        counts = (
            torch.bincount(state.batch["domain"].cpu(), minlength=len(self.domains)) * state.batch["input_ids"].shape[1]
        )
        counts = state.device.tensor_to_device(counts)
        dist.all_reduce(counts, reduce_operation="SUM")
        self.tokens += counts.cpu()
        total = max(int(self.tokens.sum()), 1)
        for domain, tokens in zip(self.domains, self.tokens.tolist(), strict=True):
            logger.log_metrics({f"mix/{domain}": tokens / total, f"tokens/{domain}": tokens})

    def state_dict(self) -> dict[str, Any]:
        """Tokens per domain."""
        return {"tokens": dict(zip(self.domains, self.tokens.tolist(), strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the counts of the checkpoint. A domain that it lacks starts at 0."""
        self.tokens = torch.tensor([state["tokens"].get(domain, 0) for domain in self.domains], dtype=torch.int64)
