"""A random tiny Llama with a tokenizer of its own, lm-eval's stock tasks on given rows, and the demo's questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mohd_train.evaluate.harness import workers_end_at_once
from mohd_train.evaluate.tasks import stock_manager
from mohd_train.results.suite import Suite, load_suite


@pytest.fixture(autouse=True)
def bootstrap_by_hand_ends_too() -> Iterator[None]:
    """lm-eval called without our harness, after tests of training in the same process."""
    with workers_end_at_once():
        yield


@pytest.fixture(scope="session")
def suite() -> Suite:
    return load_suite()


@pytest.fixture(scope="session")
def demo_questions(root: Path) -> Path:
    return root / "eval" / "demo_questions"


def byte_tokenizer(
    text: list[str], vocab_size: int, adds_bos: bool, adds_eos: bool = False, words: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS 0 and EOS 1 that puts BOS in front and EOS behind, or leaves them out.

    Args:
        words: whether tokens end at the ends of words; if not, one may hold the end of a word and the next one's beginning.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    if adds_bos or adds_eos:
        single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory, demo_questions: Path) -> Callable[..., Path]:
    """``make_llama(context=..., adds_bos=...)`` -> a Hugging Face folder; the weights are spread so that answers differ.

    The weights and the tokens of texts depend on ``seed``, ``vocab_size`` and ``words`` alone.
    """
    text = [file.read_text(encoding="utf-8") for file in sorted(demo_questions.rglob("*.jsonl"))]

    def make(
        context: int = 512,
        adds_bos: bool = True,
        seed: int = 0,
        vocab_size: int = 600,
        adds_eos: bool = False,
        words: bool = True,
    ) -> Path:
        folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
        ends = [] if words else [f"Answer: {letter}" for letter in "AB"] * 500  # tokens that hold both
        tokenizer = byte_tokenizer([*text, *ends], vocab_size, adds_bos, adds_eos, words)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=context,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Path]) -> Path:
    return make_llama()


def read_rows(folder: Path) -> datasets.DatasetDict:
    """Every split of ``folder`` as a dataset, read without the loader under test."""
    splits = {}
    for file in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        splits[file.stem] = datasets.Dataset.from_list(rows)
    for split in ("train", "validation"):  # the stock tasks open splits that 0-shot requests never use
        splits.setdefault(split, splits.get("test", splits.get("validation")))
    return datasets.DatasetDict(splits)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch, suite: Suite) -> Callable[[str, Path], Task | Group]:
    """``stock(name, data_dir)`` -> lm-eval's own task object, its hub rows replaced by those of ``data_dir``."""
    manager = stock_manager(suite.select(None))

    def build(name: str, data_dir: Path) -> Task | Group:
        def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
            return read_rows(data_dir / task / name if task == "mmlu" else data_dir / task)

        task = name
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "load_dataset", load_dataset)
            if name == "mmlu":  # only the subjects that are there
                keep_present(patch, data_dir / name)
            loaded = manager.load([name])
        item = loaded.get("groups", {}).get(name) or loaded["tasks"][name]
        for leaf in item.get_all_tasks() if isinstance(item, Group) else [item]:
            leaf.set_config("num_fewshot", suite.tasks[name].shots)
        return item

    def keep_present(patch: pytest.MonkeyPatch, folder: Path) -> None:
        for name, entry in manager.task_index.items():
            if name.startswith("mmlu_") and name.endswith("_tasks"):
                present = {tag for tag in entry.tags if (folder / manager.task_index[tag].cfg["dataset_name"]).is_dir()}
                patch.setattr(entry, "tags", present)

    return build
