"""Scores through the runner are lm-eval's own; truncation is counted, BOS is seen to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from tokenizers import processors
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.evaluate import checkpoint as checkpoints
from mohd_train.evaluate.harness import BOOTSTRAP_ITERS, HarnessLM, score
from mohd_train.evaluate.options import EvalOptions
from mohd_train.evaluate.run import run_eval
from mohd_train.evaluate.suite import Suite
from mohd_train.evaluate.tasks import BuiltTask, build_task, stock_manager

# 0-shot with normalized accuracy, two-sided, many shots, perplexity, a group
COMPARED = ["sciq", "winogrande", "hellaswag", "lambada_openai", "mmlu"]


def loaded(path: Path) -> checkpoints.LoadedModel:
    return checkpoints.load(checkpoint.open(path), device="cpu")


def built(name: str, suite: Suite, data_dir: Path, cache: Path) -> BuiltTask:
    spec = suite.tasks[name]
    return build_task(spec, stock_manager([spec]), data_dir, cache)


@pytest.fixture(scope="module")
def gpt2(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture, with learned positions and tied ends; the tokenizer is the Llama's, without BOS."""
    folder = tmp_path_factory.mktemp("gpt2") / "tiny-gpt2"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("model", "names"), [("llama", COMPARED), ("gpt2", ["winogrande", "boolq", "lambada_openai"])])
def test_equals_lm_eval_by_hand(
    model: str,
    names: list[str],
    request: pytest.FixtureRequest,
    suite: Suite,
    stock: Callable[[str, Path], Task | Group],
    demo_questions: Path,
    tmp_path: Path,
) -> None:
    path = request.getfixturevalue(model)
    status = run_eval(EvalOptions(path, tmp_path, names, demo_questions, device="cpu", batch_size=4), suite)
    assert status == 0
    by_hand = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(path)},
        tasks=[stock(name, demo_questions) for name in names],
        device="cpu",
        batch_size=4,
        bootstrap_iters=BOOTSTRAP_ITERS,
        log_samples=False,
        task_manager=stock_manager([]),  # the tasks are objects; indexing all of lm-eval's would take many seconds
    )
    for name in names:
        ours = json.loads((tmp_path / path.name / f"{name}.json").read_text(encoding="utf-8"))
        for task, metrics in ours["results"].items():
            assert metrics == by_hand["results"][task], task
            assert ours["n-samples"].get(task) == by_hand["n-samples"].get(task)
        assert ours["n-shot"].items() <= by_hand["n-shot"].items()
        assert ours["groups" if name == "mmlu" else "results"]
    assert len({by_hand["results"][name]["acc,none"] for name in names}) > 2  # the answers do differ


def test_batch_size_does_not_change_scores(llama: Path, suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    task = built("arc_easy", suite, demo_questions, tmp_path)
    one, many = (score(HarnessLM(loaded(llama), size), task, limit=None, seed=1234) for size in (1, 16))
    assert one["results"] == many["results"]


def expected_truncation(lm: HarnessLM, task: Task, seed: int) -> tuple[int, int]:
    """(requests, tokens) over the model's context, counted from the requests' texts."""
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    lengths = [
        len(lm.tokenizer.encode(context + continuation)) for context, continuation in (i.args for i in task.instances)
    ]
    excess = [length - (lm.max_length + 1) for length in lengths if length > lm.max_length + 1]
    return len(excess), sum(excess)


def test_truncated_requests_are_counted(
    make_llama: Callable[..., Path], suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    lm = HarnessLM(loaded(make_llama(context=256)))
    assert lm.max_length == 256
    long, short = (built(name, suite, demo_questions, tmp_path) for name in ("boolq", "arc_easy"))
    score(lm, long, limit=None, seed=1234)
    assert (lm.truncation.requests, lm.truncation.tokens) == expected_truncation(lm, long.leaves[0], 1234)
    assert lm.truncation.requests > 0
    assert lm.truncation.of == 16
    assert lm.truncation.longest > 257
    score(lm, short, limit=None, seed=1234)
    assert (lm.truncation.requests, lm.truncation.of) == (0, 32)


def test_answer_longer_than_the_context(
    make_llama: Callable[..., Path], suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    lm = HarnessLM(loaded(make_llama(context=4)))
    with pytest.raises(UserError, match="longer than the model's 4"):
        score(lm, built("arc_challenge", suite, demo_questions, tmp_path), limit=None, seed=1234)


@pytest.mark.parametrize(
    ("adds_bos", "ours", "asked", "shown", "begins"),
    [
        (True, False, None, "by the tokenizer", True),
        (True, True, None, "by the tokenizer", True),
        (False, False, None, "none", False),  # as lm-eval by hand
        (False, True, None, "prepended", True),  # documents of our training data all begin with BOS
        (False, False, True, "prepended", True),
        (True, True, False, "none", False),
    ],
)
def test_bos(
    make_llama: Callable[..., Path], adds_bos: bool, ours: bool, asked: bool | None, shown: str, begins: bool
) -> None:
    model = loaded(make_llama(adds_bos=adds_bos))
    model.ours = ours
    lm = HarnessLM(model, bos=asked)
    assert lm.bos == shown
    for text in ("one word", "<s>one word") if begins else ("one word",):
        tokens = lm.tok_encode(text)
        assert (tokens[0] == lm.tokenizer.bos_token_id) is begins
        assert tokens.count(lm.tokenizer.bos_token_id) == int(begins)
    context, continuation = lm._encode_pair("Question: x\nAnswer:", " yes")
    assert lm.tokenizer.bos_token_id not in continuation
    assert (context[0] == lm.tokenizer.bos_token_id) is begins


def test_progress_reaches_the_end(llama: Path, suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    task = built("piqa", suite, demo_questions, tmp_path)
    score(HarnessLM(loaded(llama)), task, limit=4, seed=1234, progress=lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_shots_follow_the_seed(llama: Path, suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    def prompts(seed: int) -> list[Any]:
        task = built("hellaswag", suite, demo_questions, tmp_path).leaves[0]
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(limit=2, rank=0, world_size=1)
        return [instance.args for instance in task.instances]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)
