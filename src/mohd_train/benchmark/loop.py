"""What a run costs compared with a bare PyTorch loop over the same model and batches, both in one process, in turn."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from composer import Callback, ComposerModel, Logger, State

from mohd_train.benchmark.startup import tiny_run
from mohd_train.config.load import load_config
from mohd_train.train import registry, train

WARM_UP = 8  # batches before the first round


def measure(data: Path, args: list[str], rounds: int, each: int = 20) -> dict[str, Any]:
    """Trains ``configs/model/tiny.yaml`` on prepared data, and after every ``each`` of its batches takes the same batches through a
    copy of its model with forward, backward, clipping, AdamW and nothing else.

    Args:
        args: more config files and overrides, such as ``configs/mohd/x2.yaml``.

    Returns:
        Seconds a batch of both (processor time, medians of the rounds), their ratio by round, and the share of the run's time in
        which it waited for data.
    """
    args = [*tiny_run(data), *args]
    files, overrides = [arg for arg in args if "=" not in arg], [arg for arg in args if "=" in arg]
    watch = BesideBareLoop(each)
    registry.CALLBACKS["beside_bare_loop"] = lambda: watch  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        overrides += [
            f"run_folder={folder}/run", f"max_duration={WARM_UP + each * rounds + 1}ba", "device=cpu", "progress_bar=false",
            "eval_interval=10000ba", "save_interval=10000ba", "callbacks={beside_bare_loop: {}}",
        ]  # fmt: skip
        try:
            train.train(load_config(files, overrides))
        finally:
            del registry.CALLBACKS["beside_bare_loop"]
    return watch.found()


class BesideBareLoop(Callback):
    """Times the batches of the run it is in, and the same batches without the run."""

    def __init__(self, each: int) -> None:
        self.each = each
        self.batches: list[Any] = []
        self.own: list[float] = []
        self.bare: list[float] = []
        self.waits: list[float] = []
        self.began = self.waiting = self.waited = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A round starts before its first batch is fetched."""
        batch = state.timestamp.batch.value
        if batch >= WARM_UP and (batch - WARM_UP) % self.each == 0:
            if self.batches:
                self.own.append(time.process_time() - self.began)
                self.waits.append(self.waited / self.own[-1])
                self.bare.append(self._without_the_run(state))
            self.batches, self.waited, self.began = [], 0.0, time.process_time()
        self.waiting = time.process_time()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch has arrived."""
        self.waited += time.process_time() - self.waiting
        if state.timestamp.batch.value >= WARM_UP:
            self.batches.append(state.batch)

    def _without_the_run(self, state: State) -> float:
        model = copy.deepcopy(state.model)
        assert isinstance(model, ComposerModel)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95))
        seconds = 0.0
        for index, batch in enumerate([self.batches[-1], *self.batches]):
            start = time.process_time()
            optimizer.zero_grad()
            losses: Any = model.loss(model(batch), batch)
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seconds += (time.process_time() - start) if index else 0.0  # the first step creates the moments
        return seconds

    def found(self) -> dict[str, Any]:
        """What :func:`measure` returns."""
        ratios = [own / bare for own, bare in zip(self.own, self.bare, strict=True)]
        return {
            "seconds_a_batch": statistics.median(self.own) / self.each,
            "seconds_a_batch_bare": statistics.median(self.bare) / self.each,
            "ratio_median": statistics.median(ratios),
            "ratios": ratios,
            "data_share": statistics.median(self.waits),
        }
