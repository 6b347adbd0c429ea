"""A real pretrained Llama through the study: SmolLM2-135M, where it is there (see support/smollm2.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import smollm2

from mohd_train.analysis.corpus import open_corpus
from mohd_train.analysis.options import StudyOptions
from mohd_train.analysis.study import observe
from mohd_train.analysis.subject import Subject, fingerprint

pytestmark = pytest.mark.real_data
LAYER = 15  # of 30


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, tokenizer = smollm2.load(smollm2.find())
    return Subject(model, tokenizer, None, {"name": "SmolLM2-135M", "source": "gguf"})


@pytest.fixture(scope="module")
def text(real_data: Path) -> Path:
    return real_data / "redpajama_sample" / "c4-rp" / "sample_c4-rp1.jsonl"


def test_its_fingerprint_reads_the_last_number_of_its_embedding(subject: Subject) -> None:
    """49152 x 576 numbers, more than 2^24: IndexError before."""
    weight = subject.model.get_input_embeddings().weight
    assert weight.numel() > 2**24
    before = fingerprint(subject.model)
    with torch.no_grad():
        kept = weight[-1, -1].clone()
        weight[-1, -1] += 1
        changed = fingerprint(subject.model)
        weight[-1, -1] = kept
    assert before != changed
    assert fingerprint(subject.model) == before


@torch.inference_mode()
def test_it_is_loaded_as_it_was_trained(subject: Subject, text: Path) -> None:
    assert subject.tokenizer is not None
    assert subject.tokenizer("Hello world")["input_ids"] == [19556, 905]  # no BOS
    assert subject.tokenizer.eos_token == "<|endoftext|>"
    batch = next(open_corpus(text, subject, 256).batches(512, 2))
    loss = subject.model(batch.ids_BT, labels=batch.ids_BT).loss.item()
    assert loss < 4.5  # ln(49152) = 10.8 for a model that was read wrongly


@pytest.mark.parametrize(("magnitude", "held", "noise"), [("square", 0.932, 0.716), ("absolute", 0.586, 0.508)])
def test_what_its_largest_dims_hold(subject: Subject, text: Path, magnitude: str, held: float, noise: float) -> None:
    """By squares more than LLaMA2-7B's 71.96%, by |x| less: the definition turns the conclusion round."""
    corpus = open_corpus(text, subject, 512)
    record = observe(subject, corpus, StudyOptions(tokens=512, batch_size=1, magnitude=magnitude, layer=LAYER))
    assert max(record["residual_error"]) < 1e-4
    assert record["top_dims"] == 141  # 1000 of 4096
    found = record["layers"][LAYER]["points"]["attention_in"]
    assert found["share_of_top_dims"] == pytest.approx(held, abs=0.015)
    assert record["gaussian"]["share_of_top_dims"] == pytest.approx(noise, abs=0.01)
    assert (found["share_of_top_dims"] > 0.7196) == (magnitude == "square")
    flow = record["layers"][LAYER]["flow_percent_of_block_input_per_token"]["attention_out"]
    assert flow < 100  # the ratio that stands beside the paper's 6.7%; of its own normalized input it is over 200
    assert not any("\u0120" in text for text in record["map_tokens"])
