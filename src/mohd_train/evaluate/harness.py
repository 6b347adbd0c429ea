"""A causal language model scored by lm-eval, in process, with what lm-eval keeps silent about: truncation and BOS."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lm_eval.evaluator
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from mohd_train.errors import UserError
from mohd_train.evaluate.checkpoint import LoadedModel
from mohd_train.evaluate.tasks import BuiltTask

BOOTSTRAP_ITERS = 1000  # for the standard error of the perplexity; those of accuracies have a closed form

Progress = Callable[[int, int], None]  # (requests answered, requests in all)


@dataclass
class Truncation:
    """Requests longer than the model reads: lm-eval cuts them on the left, so that shots are lost."""

    requests: int = 0
    of: int = 0
    tokens: int = 0  # cut in all
    longest: int = 0  # tokens of the longest request, before the cut


class HarnessLM(HFLM):
    """lm-eval's own model around ours; counts truncated requests, and sees to BOS.

    Args:
        loaded: model and tokenizer.
        batch_size: requests a forward pass, or "auto".
        bos: whether each request begins with BOS. None: as the tokenizer does it, but always for models trained by this
            framework, whose documents all begin with BOS.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int | str = 8, bos: bool | None = None) -> None:
        tokenizer = loaded.tokenizer
        super().__init__(
            pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", add_bos_token=bos
        )
        by_tokenizer = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        wanted = bos if bos is not None else (by_tokenizer or (loaded.ours and tokenizer.bos_token_id is not None))
        if wanted and tokenizer.bos_token_id is None:
            raise UserError(f"the tokenizer {loaded.info['tokenizer']} has no BOS token; leave --bos at auto or no")
        self.bos = "none" if not wanted else "by the tokenizer" if by_tokenizer else "prepended"
        self.truncation = Truncation()
        self.progress: Progress | None = None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As lm-eval does it; where the tokenizer adds no BOS and the model needs it, it is put in front."""
        tokens = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        if self.bos == "prepended" and add_special_tokens is not False and tokens[:1] != [self.tokenizer.bos_token_id]:
            return [self.tokenizer.bos_token_id, *tokens]
        return tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) for each request."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, text), context, continuation in requests:
            self._measure(text, len(context), len(continuation))
        self.set_cache_hook(_ProgressHook(self.progress, len(requests)))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)

    def _measure(self, text: str, context: int, continuation: int) -> None:
        if continuation == 0:
            raise UserError(f"the answer {text!r} has no token of its own: the tokenizer merges it with its context")
        if continuation > self.max_length:
            raise UserError(
                f"an answer of {continuation} tokens is longer than the model's {self.max_length}: {text[:60]!r}..."
            )
        excess = context + continuation - (self.max_length + 1)  # the last token is predicted, never read
        self.truncation.of += 1
        self.truncation.longest = max(self.truncation.longest, context + continuation)
        if excess > 0:
            self.truncation.requests += 1
            self.truncation.tokens += excess


class _ProgressHook(CacheHook):
    """lm-eval tells its cache of each answer; here that moves the bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        super().__init__(None)
        self.progress, self.total, self.done = progress, total, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's own bars and prints off: one bar for a task is enough."""
    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def workers_end_at_once() -> Iterator[None]:
    """Leaves SIGTERM to the system. lm-eval's bootstrap forks a pool and ends it by SIGTERM; a handler that importing Composer sets
    would make of it an orderly exit, which waits for ever where a data set's threads were forked along."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def score(
    lm: HarnessLM, built: BuiltTask, *, limit: int | None, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """lm-eval's own results (`results`, `groups`, `configs`, `versions`, `n-shot`, `n-samples`, ...) of one task.

    Equal, number for number, to ``lm_eval.simple_evaluate(model=HFLM(...), tasks=[...])`` with the same shots and seeds;
    ``lm.truncation`` then holds the counts of this task.

    Args:
        limit: questions a task (a subject), for trials; None: all.
        seed: draws the shots.
    """
    random.seed(0)  # simple_evaluate's own defaults
    np.random.seed(seed)
    torch.manual_seed(seed)
    lm.truncation, lm.progress = Truncation(), progress
    for task in built.leaves:
        task.set_fewshot_seed(seed=seed)
    groups = {built.item.name: built.item} if isinstance(built.item, Group) else {}
    for group in list(groups.values()):
        groups.update({sub.name: sub for sub in group.get_all_groups()})
    loaded = {"tasks": {task.task_name: task for task in built.leaves}, "groups": groups}
    with _quiet(), workers_end_at_once():
        results = lm_eval.evaluator.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )
    assert results is not None, "one process: this is the first rank"
    return dict(results)
