"""Scores a causal language model with lm-eval, in process, and reports what lm-eval doesn't: truncation, BOS and EOS, answers
that share a token with their question, log-probabilities that are NaN."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import random
import signal
import threading
from collections.abc import Iterator
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
from mohd_train.evaluate.load import LoadedModel
from mohd_train.evaluate.tasks import BuiltTask
from mohd_train.utils.encoding import added_ids, encode_text
from mohd_train.utils.progress import Report

BOOTSTRAP_ITERS = (
    100_000  # lm-eval's default; for the standard error of LAMBADA's perplexity (the others have a closed form)
)


@dataclass
class Truncation:
    """Requests longer than the model's context: lm-eval cuts them on the left, so shots are lost."""

    requests: int = 0
    of: int = 0
    tokens: int = 0  # requests cut
    longest: int = 0  # tokens of the longest request, before the cut


@dataclass
class Joined:
    """Requests in which one token holds both the end of the question and the beginning of the answer.

    lm-eval encodes both together and splits after as many tokens as the question alone has. With such a token, an answer loses
    its beginning; if it loses everything, lm-eval crashes. Here such an answer is encoded separately.
    """

    requests: int = 0
    alone: int = 0  # of these, answers encoded separately


class HarnessLM(HFLM):
    """lm-eval's own model wrapper; counts truncated and joined requests, and handles BOS and EOS.

    Args:
        loaded: model and tokenizer.
        batch_size: requests a forward pass, or "auto".
        bos: whether each request begins with BOS. None: as the tokenizer does it, but always for models trained by this
            framework, whose documents all begin with BOS.

    Attributes:
        bos: "none", "by the tokenizer" or "prepended".
        dropped: tokens that the tokenizer appends to a text (EOS) and that are left out, "" for none: lm-eval would treat them as
            part of each question and answer.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int | str = 8, bos: bool | None = None) -> None:
        tokenizer = loaded.tokenizer
        super().__init__(
            pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", add_bos_token=bos
        )
        before, behind = added_ids(tokenizer)
        by_tokenizer = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in before
        wanted = bos if bos is not None else (by_tokenizer or (loaded.ours and tokenizer.bos_token_id is not None))
        if wanted and tokenizer.bos_token_id is None:
            raise UserError(f"the tokenizer {loaded.info['tokenizer']} has no BOS token; leave --bos at auto or no")
        self.bos = "none" if not wanted else "by the tokenizer" if by_tokenizer else "prepended"
        self.dropped = " ".join(tokenizer.convert_ids_to_tokens(behind))
        self._before = (
            [] if bos is False else before if by_tokenizer or not wanted else [tokenizer.bos_token_id, *before]
        )
        self.task = ""
        self.truncation, self.joined = Truncation(), Joined()
        self.progress: Report | None = None

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text; BOS comes first if requests begin with it, unless the text already has it or ``add_special_tokens`` is
        False. Nothing is appended."""
        tokens = encode_text(self.tokenizer, string)
        if add_special_tokens is not False and tokens[: len(self._before)] != self._before:
            tokens = [*self._before, *tokens]
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(ids of the question, ids of the answer), split as lm-eval does; see :class:`Joined` for what it can't split."""
        question = context.rstrip()
        answer = context[len(question) :] + continuation
        context_enc, whole = self.tok_encode(question), self.tok_encode(question + answer)
        continuation_enc = whole[len(context_enc) :]
        if whole[: len(context_enc)] != context_enc:
            self.joined.requests += 1
            if not continuation_enc:
                self.joined.alone += 1
                continuation_enc = self.tok_encode(answer, add_special_tokens=False)
        return context_enc or [self.prefix_token_id], continuation_enc  # a question of white space alone has no token

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) for each request."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, text), context, continuation in requests:
            self._measure(text, len(context), len(continuation))
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        self.set_cache_hook(_ProgressHook(self.progress, len(requests), longest))
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)
        undefined = sum(math.isnan(logprob) for logprob, _ in answers)
        if undefined:
            raise UserError(
                f"{self.task}: the model's log-probability is not a number (NaN) in {undefined} of {len(answers)} requests; "
                "its training diverged, or --dtype can't hold its activations (try --dtype float32)"
            )
        return answers

    def _measure(self, text: str, context: int, continuation: int) -> None:
        if continuation == 0:
            raise UserError(f"{self.task}: the tokenizer has no token for the answer {text!r}, so it can't be scored")
        if continuation > self.max_length:
            raise UserError(
                f"{self.task}: an answer of {continuation} tokens is longer than the model's {self.max_length}: {text[:60]!r}..."
            )
        excess = context + continuation - (self.max_length + 1)  # the last token is predicted, never read
        self.truncation.of += 1
        self.truncation.longest = max(self.truncation.longest, context + continuation)
        if excess > 0:
            self.truncation.requests += 1
            self.truncation.tokens += excess


class _ProgressHook(CacheHook):
    """lm-eval reports each answer to its cache; here that drives the progress bar. It starts with the longest requests, so the
    first ones say little about the rest."""

    def __init__(self, progress: Report | None, total: int, longest: int) -> None:
        super().__init__(None)
        self.progress, self.total, self.done = progress, total, 0
        if progress is not None:
            progress(0, total, f"the longest first, of {longest:,} tokens")

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turns off lm-eval's own progress bars and prints: one bar per task is enough."""
    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def workers_end_at_once() -> Iterator[None]:
    """Restores the default SIGTERM handler. lm-eval's bootstrap forks a pool and ends it with SIGTERM; the handler that importing
    Composer installs would turn that into an orderly exit, which hangs if the threads of a data set were forked along."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def score(
    lm: HarnessLM, built: BuiltTask, *, limit: int | None, seed: int, progress: Report | None = None
) -> dict[str, Any]:
    """lm-eval's own results (`results`, `groups`, `configs`, `versions`, `n-shot`, `n-samples`, ...) of one task.

    The numbers equal those of ``lm_eval.simple_evaluate(model=HFLM(...), tasks=[...])`` with the same shots and seeds, for a
    tokenizer that appends nothing. Afterwards ``lm.truncation`` and ``lm.joined`` hold the counts of this task.

    Args:
        limit: questions a task (a subject), for trials; None: all.
        seed: draws the shots.

    Raises:
        UserError: an answer that can't be scored, or log-probabilities that are NaN; the message names the task.
    """
    random.seed(0)  # simple_evaluate's own defaults
    np.random.seed(seed)
    torch.manual_seed(seed)
    lm.task, lm.truncation, lm.joined, lm.progress = built.spec.name, Truncation(), Joined(), progress
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
