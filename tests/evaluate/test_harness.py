"""Scores through the runner are lm-eval's own; truncation is counted, BOS and EOS are taken care of."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from data.data_support import train_pieces
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from support.tokenizers import ADDING, adding
from tokenizers import normalizers, processors
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
)

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.evaluate import load as checkpoints
from mohd_train.evaluate.harness import HarnessLM, Joined, score
from mohd_train.evaluate.options import EvalOptions
from mohd_train.evaluate.run import run_eval
from mohd_train.evaluate.tasks import BuiltTask, build_task, stock_manager
from mohd_train.results import store as results
from mohd_train.results.suite import Suite
from mohd_train.utils.encoding import added_ids, encode_text

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
        log_samples=False,
        task_manager=stock_manager([]),  # the tasks are objects; indexing all of lm-eval's would take many seconds
    )
    for name in names:
        ours = json.loads((tmp_path / path.name / f"{name}.json").read_text(encoding="utf-8"))
        for task, metrics in ours["results"].items():
            close = {  # a perplexity's last digits depend on where the weights lie in memory
                key: pytest.approx(value, rel=1e-6, abs=0) if isinstance(value, float) else value
                for key, value in by_hand["results"][task].items()
            }
            assert metrics == close, task
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
    with pytest.raises(UserError, match=r"arc_challenge: an answer of .* longer than the model's 4"):
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


@pytest.mark.parametrize("adds_bos", [False, True])
def test_eos_that_the_tokenizer_appends_changes_no_score(
    make_llama: Callable[..., Path], adds_bos: bool, suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    """Answers of one token (mmlu), of several, and the last word of a text."""
    plain, appending = (loaded(make_llama(adds_bos=adds_bos, adds_eos=adds_eos)) for adds_eos in (False, True))
    assert appending.tokenizer("a")["input_ids"][-1] == appending.tokenizer.eos_token_id
    for name in ("mmlu", "winogrande", "lambada_openai"):
        task = built(name, suite, demo_questions, tmp_path)
        expected, found = (score(HarnessLM(model), task, limit=None, seed=1234) for model in (plain, appending))
        assert found["results"] == expected["results"]
    assert (HarnessLM(plain).dropped, HarnessLM(appending).dropped) == ("", "</s>")


@pytest.mark.parametrize(("kind", "bos", "eos"), ADDING)
def test_each_request_begins_with_bos_and_none_ends_with_eos(
    kind: str, bos: bool, eos: bool, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Tokenizers of each kind: what they add is known, what a question is encoded to does not depend on it."""
    model = loaded(make_llama())
    model.tokenizer = adding(kind, bos, eos, train_pieces(tmp_path), tmp_path / "tokenizer")
    assert added_ids(model.tokenizer) == ([1] if bos else [], [2] if eos else [])
    text = encode_text(model.tokenizer, "Question: is it?\nAnswer:")
    answer = encode_text(model.tokenizer, "Question: is it?\nAnswer: yes")[len(text) :]
    for ours, asked, begins in ((False, None, bos), (True, None, True), (True, False, False), (False, True, True)):
        model.ours = ours
        pair = HarnessLM(model, bos=asked)._encode_pair("Question: is it?\nAnswer:", " yes")
        assert pair == ([1] * begins + text, answer)


def test_a_token_across_the_join_is_counted_and_the_answer_encoded_alone(
    make_llama: Callable[..., Path], suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    """Split as lm-eval does it wherever that leaves the answer a token; it stops at the others."""
    model = loaded(make_llama(words=False, vocab_size=2000))
    lm, theirs = HarnessLM(model), HFLM(pretrained=model.model, tokenizer=model.tokenizer)
    task = built("mmlu", suite, demo_questions, tmp_path)
    raw = score(lm, task, limit=None, seed=1234)
    requests = [i.args for leaf in task.leaves for i in leaf.instances]
    expected = Joined()
    for question, answer in requests:
        context, continuation = theirs._encode_pair(question, answer)
        whole = theirs.tok_encode(question + answer)
        expected.requests += whole[: len(context)] != context
        expected.alone += not continuation
        alone = encode_text(model.tokenizer, question[len(question.rstrip()) :] + answer)
        assert lm._encode_pair(question, answer) == (context, continuation or alone)
        assert alone
    assert 0 < expected.alone <= expected.requests <= len(requests)
    score(lm, task, limit=None, seed=1234)
    assert lm.joined == expected
    assert 0 <= raw["results"]["mmlu"]["acc,none"] <= 1


def test_an_answer_without_a_token_is_named_with_its_task(
    make_llama: Callable[..., Path], suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    model = loaded(make_llama())
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" B", "")
    with pytest.raises(UserError, match="mmlu: the tokenizer has no token for the answer ' B'"):
        score(HarnessLM(model), built("mmlu", suite, demo_questions, tmp_path), limit=None, seed=1234)


def test_scores_of_a_model_that_gives_no_numbers_are_refused(
    llama: Path, suite: Suite, demo_questions: Path, tmp_path: Path
) -> None:
    """The highest of several NaN is the first: such a model would score as often as the first answer is right."""
    model = loaded(llama)
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"sciq: the model's log-probability is not a number \(NaN\) in 32 of 32"):
        score(HarnessLM(model), built("sciq", suite, demo_questions, tmp_path), limit=None, seed=1234)


def test_mean_over_subjects_equals_lm_eval_s(
    llama: Path, suite: Suite, stock: Callable[[str, Path], Task | Group], demo_questions: Path, tmp_path: Path
) -> None:
    """lm-eval's own mean of a group with ``weight_by_size: false``, of subjects of unlike size."""
    rows = Path(shutil.copytree(demo_questions, tmp_path / "rows"))
    file = sorted(rows.glob("mmlu/*/test.jsonl"))[0]
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    assert run_eval(EvalOptions(llama, tmp_path / "out", ["mmlu"], rows, device="cpu"), suite) == 0
    result = results.read(tmp_path / "out" / "tiny-llama" / "mmlu.json")
    group = stock("mmlu", rows)
    assert isinstance(group, Group)
    for aggregate in group.aggregate_metric_list:
        aggregate.weight_by_size = False
    by_hand = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(llama)},
        tasks=[group],
        device="cpu",
        log_samples=False,
        task_manager=stock_manager([]),
    )["results"]
    assert result.scores["acc_macro"] == by_hand["mmlu"]["acc,none"]
    assert result.scores["acc_macro_stderr"] == by_hand["mmlu"]["acc_stderr,none"]
    assert result.scores["acc_macro"] != result.scores["acc"]
    assert len(result.subject_scores) == len(list(rows.glob("mmlu/*"))) == result.subjects
    for subject, scores in result.subject_scores.items():
        assert scores["acc"] == by_hand[f"mmlu_{subject}"]["acc,none"]
    old = json.loads((tmp_path / "out" / "tiny-llama" / "mmlu.json").read_text(encoding="utf-8"))
    del old["mohd_train"]["joined"], old["mohd_train"]["settings"]["dropped"], old["mohd_train"]["subject_scores"]
    for key in ("acc_macro", "acc_macro_stderr"):
        del old["mohd_train"]["scores"][key]
    (tmp_path / "mmlu.json").write_text(json.dumps(old), encoding="utf-8")
    again = results.read(tmp_path / "mmlu.json")  # a result of an earlier version
    assert (again.scores, again.subject_scores, again.joined) == (result.scores, result.subject_scores, {})


def test_progress_reaches_the_end(llama: Path, suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    task = built("piqa", suite, demo_questions, tmp_path)
    score(HarnessLM(loaded(llama)), task, limit=4, seed=1234, progress=lambda *at: seen.append(at))
    assert seen[0][:2] == (0, 8)  # at once, with the length of what takes longest
    assert re.fullmatch(r"the longest first, of \d+ tokens", seen[0][2])
    assert seen[1:] == [(i, 8) for i in range(1, 9)]


def test_shots_follow_the_seed(llama: Path, suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    def prompts(seed: int) -> list[Any]:
        task = built("hellaswag", suite, demo_questions, tmp_path).leaves[0]
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(limit=2, rank=0, world_size=1)
        return [instance.args for instance in task.instances]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


@pytest.mark.real_data
def test_llamas_tokenizer_splits_real_questions_as_lm_eval_does(real_data: Path, suite: Suite, tmp_path: Path) -> None:
    """Of each of the ten tasks; no answer of theirs shares a token with its question."""
    tokenizer = LlamaTokenizerFast(str(real_data / "llama_tokenizer.model"), legacy=True, add_prefix_space=True)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)
    tokenizer.add_eos_token = True
    lm = HarnessLM(checkpoints.LoadedModel(model, tokenizer, {"tokenizer": "llama"}, 32_000, ours=False))
    tokenizer.add_eos_token = False
    assert lm.dropped == "</s>"
    rows = tmp_path / "rows"
    (rows / "mmlu").mkdir(parents=True)
    subjects = sorted((real_data / "eval" / "mmlu").iterdir())[:2]  # building 57 takes half a minute
    for part in (*(name for name in suite.tasks if name != "mmlu"), *(f"mmlu/{path.name}" for path in subjects)):
        (rows / part).symlink_to(real_data / "eval" / part)
    for name in suite.tasks:
        for leaf in built(name, suite, rows, tmp_path).leaves:
            leaf.set_fewshot_seed(seed=1234)
            leaf.build_all_requests(limit=2, rank=0, world_size=1)
            pairs = [instance.args for instance in leaf.instances]
            expected = [theirs._encode_pair(*pair) for pair in pairs]
            tokenizer.add_eos_token = True
            assert [lm._encode_pair(*pair) for pair in pairs] == expected
            tokenizer.add_eos_token = False
    assert lm.joined == Joined()
