"""Progress on the terminal: Composer's bar shows neither tokens per second nor MFU, and prints every hyperparameter
first."""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import Any, TextIO

from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from mohd_train.train.callbacks.validation_total import ValidationTotal
from mohd_train.utils.text import duration, short

WINDOW = 20  # batches over which speed is averaged
LINES = 20  # plain lines in a run, where no interval is given


class Progress(Callback):
    """A bar on a terminal, plain lines elsewhere: batch, loss, tokens/s, MFU where the device's peak is known, time
    left.

    Args:
        steps: batches of the whole run.
        validation: source of the validation line.
        bar: whether a terminal gets a bar.
        interval: batches between plain lines; None: 20 lines a run if there is no bar, none if there is one.
        stream: where to write; rank 0 only.
    """

    def __init__(
        self,
        steps: int,
        validation: ValidationTotal,
        *,
        bar: bool = True,
        interval: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.steps, self.validation = steps, validation
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.enabled = dist.get_global_rank() == 0
        self.bar = bar and self.console.is_terminal
        self.interval = interval if interval or self.bar or not bar else max(1, steps // LINES)
        self.peak: float = 0.0
        self._history: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)  # seconds trained, tokens
        self._progress: RichProgress | None = None
        self._task: TaskID | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Starts at the batch from which this session resumes."""
        self.peak = get_gpu_flops_available(state) or 0.0
        self._history.append((state.timestamp.total_wct.total_seconds(), state.timestamp.token.value))
        if self.enabled and self.peak and (self.bar or self.interval):
            self.console.print(f"MFU is of {short(self.peak)}FLOP/s per device ({state.precision.value})")
        if self.enabled and self.bar:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
            self._progress = RichProgress(*columns, console=self.console, transient=False)
            self._progress.start()
            self._task = self._progress.add_task(
                "train", total=self.steps, completed=state.timestamp.batch.value, line=""
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """After every batch."""
        self._history.append((state.timestamp.total_wct.total_seconds(), state.timestamp.token.value))
        if not self.enabled:
            return
        batch = state.timestamp.batch.value
        line = self._line(state)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=batch, line=line)
        if self.interval and (batch % self.interval == 0 or batch in (1, self.steps)):
            self.console.print(line)

    def _line(self, state: State) -> str:
        (start, before), (end, after) = self._history[0], self._history[-1]
        seconds, tokens, batches = end - start, after - before, len(self._history) - 1
        losses, batch = state.total_loss_dict, state.timestamp.batch.value
        parts = [f"{batch}/{self.steps} ba", f"loss {losses['loss/train/cross_entropy']:.4f}"]
        if losses["loss/train/balance"]:
            parts.append(f"balance {losses['loss/train/balance']:.4f}")
        if seconds > 0:
            parts.append(f"{short(tokens / seconds)} tok/s")
            if self.peak:
                model: Any = state.model if hasattr(state.model, "flops_per_batch") else state.model.module
                flops = model.flops_per_batch(state.batch) * batches / seconds
                parts.append(f"MFU {flops / self.peak:.1%}")
            parts.append(f"{duration((self.steps - batch) * seconds / batches)} left")
        return " · ".join(parts)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Names the domain that is being validated."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"validate {state.dataloader_label}")

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """One line per round of validation."""
        self._validated(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """The validation before the first batch."""
        self._validated(state)

    def _validated(self, state: State) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="train")
        latest = self.validation.latest
        if self.enabled and latest and (self.bar or self.interval):
            total, domains = latest["all"], [f"{name} {loss:.4f}" for name, loss in latest.items() if name != "all"]
            perplexity = f"perplexity {math.exp(min(total, 700.0)):.4g}"
            self.console.print(
                f"validation at {state.timestamp.batch.value} ba · loss {total:.4f} · {perplexity} · {' · '.join(domains)}"
            )

    def close(self, state: State, logger: Logger) -> None:
        """Restores the terminal, whatever happened."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
