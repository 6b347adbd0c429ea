"""Handles a NaN or infinite loss, and warns of loss spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from mohd_train.errors import UserError

WINDOW = 128  # batches whose median is the usual loss
NEEDED = 16  # of them before a spike can be recognized
SKIPS = 10  # consecutive batches that may be skipped


class LossGuard(Callback):
    """Looks at every microbatch's loss and at the gradients, on all ranks, before the optimizer's step.

    ``stop``: ends the run with the weights as they were. ``skip``: skips the batch's update, at most :data:`SKIPS`
    times in a row, and logs ``faults/skipped_batches``. A fp16 gradient scaler deals with infinite gradients itself:
    there losses alone count.

    Args:
        action: ``stop`` | ``skip``.
        spike_factor: warns of a loss above this multiple of the median of the last :data:`WINDOW` batches; None: never.
        notice: reports a line to the user.
        newest: the last complete checkpoint, or None.
    """

    def __init__(
        self,
        action: str,
        spike_factor: float | None,
        notice: Callable[[State, str, str], None],
        newest: Callable[[], str | None],
    ) -> None:
        self.action, self.spike_factor, self.notice, self.newest = action, spike_factor, notice, newest
        self.skipped = self._in_a_row = 0
        self._bad: Tensor | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Resets: a batch that ran out of memory is retried from here."""
        self._bad = None

    def after_loss(self, state: State, logger: Logger) -> None:
        """Records a microbatch's loss, without waiting for the device."""
        losses: Any = state.loss
        bad = ~torch.isfinite(losses["total"].detach()).reshape(1)
        self._bad = bad if self._bad is None else self._bad | bad

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """After the last backward pass, before the step; the gradients are those of all ranks by now."""
        assert self._bad is not None
        bad = self._bad
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None and p.grad.numel()]
        scaled = state.scaler is not None and state.scaler.is_enabled()
        if gradients and not scaled:
            bad = bad | ~torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum()).reshape(1)
        flag = bad.to(torch.int32)
        dist.all_reduce(flag, reduce_operation="MAX")
        if not flag.item():
            self._in_a_row = 0
            return
        batch = state.timestamp.batch.value + 1
        self._in_a_row += 1
        if self.action == "stop" or self._in_a_row > SKIPS:
            often = "" if self.action == "stop" else f" for the {self._in_a_row}th time in a row"
            raise UserError(
                f"batch {batch}: the loss or a gradient is not a finite number{often}; nothing of this batch is kept. "
                f"The last good checkpoint is {self.newest() or 'none yet'}: resume from it with autoresume=true, "
                "with nonfinite_loss=skip if the batch is to blame, or as another run with a lower optimizer.lr"
            )
        self.skipped += 1
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is left alone by the step
        logger.log_metrics({"faults/skipped_batches": self.skipped})
        self.notice(state, "nonfinite_loss", f"batch {batch}: loss or gradient is not finite; its update is skipped")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Compares the loss with the usual one."""
        loss = state.total_loss_dict["loss/train/cross_entropy"]
        if not math.isfinite(loss):
            return
        if self.spike_factor is not None and len(self._recent) >= NEEDED:
            usual = statistics.median(self._recent)
            if loss > self.spike_factor * usual:
                times = f"{loss / usual:.1f} times the recent median {usual:.3f}"
                text = f"loss {loss:.3f} at batch {state.timestamp.batch.value}, {times}"
                self.notice(state, "loss_spike", f"{text}; if it does not come down, go back to an earlier checkpoint")
        self._recent.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Skips so far, and the recent losses."""
        return {"skipped": self.skipped, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.skipped = state["skipped"]
        self._recent = deque(state["recent"], maxlen=WINDOW)
