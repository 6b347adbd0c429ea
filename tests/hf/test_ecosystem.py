"""Clients that the project doesn't depend on: ``make test-ecosystem`` installs them into a folder of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf.test_clients import ids_of, model_of
from support.native import save_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    QuantizedCache,
)

from mohd_train.hf import MoHDForCausalLM

WORDS = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(5, 25)]


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_trls_sft_trainer_with_its_defaults(tmp_path: Path, setting: str, adapter: bool) -> None:
    """One step on a text data set, all weights or LoRA: the loss it logs is the model's own, and weights change."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft") if adapter else None
    model = model_of(setting)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, max_length=32, report_to=[],
        logging_steps=1, use_cpu=True, bf16=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": WORDS}),
        processing_class=tokenizer_of(tmp_path / "tokenizer"),
        peft_config=None if peft is None else peft.LoraConfig(target_modules=["q_proj", "down_proj"]),
    )
    trainer.train()
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert 3 < logged < 7  # ln 97 = 4.6, and the balance loss
    after = {name.removeprefix("base_model.model."): value for name, value in trainer.model.named_parameters()}
    if adapter:
        moved = [name for name, value in after.items() if "lora_B" in name and value.abs().sum() > 0]
        assert any("q_proj" in name for name in moved)
        assert any("down_proj" in name for name in moved)
    else:
        assert all(not torch.equal(after[name], value) for name, value in before.items() if "down_proj" in name)


# Quantization


def quantized(model: MoHDForCausalLM, folder: Path, **how: bool) -> Any:
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(**how)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_bitsandbytes_in_eight_bits(tmp_path: Path, setting: str) -> None:
    """Products with weights and inputs of 8 bits: logits within a few percent."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, ids = model_of(setting), ids_of()
    small = quantized(model, tmp_path, load_in_8bit=True)
    assert (
        sum(isinstance(module, bitsandbytes.nn.Linear8bitLt) for module in small.modules()) >= 14
    )  # q k v o gate up down, twice
    want = model(ids).logits
    assert (small(ids).logits - want).norm() < 0.04 * want.norm()


@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_bitsandbytes_in_four_bits(tmp_path: Path, setting: str) -> None:
    """The same logits as a model whose weights are those that 4 bits can tell apart."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, ids = model_of(setting), ids_of()
    small = quantized(model, tmp_path, load_in_4bit=True)
    rounded = {name: module for name, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(rounded) >= 14
    with torch.no_grad():
        for name, module in rounded.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
    torch.testing.assert_close(small(ids).logits.float(), model(ids).logits, rtol=1e-3, atol=1e-3)


def test_qlora_trains_the_adapter_of_a_four_bit_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    base = peft.prepare_model_for_kbit_training(quantized(model_of(), tmp_path, load_in_4bit=True))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = ids_of()
    model(ids, labels=ids).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(grads) == 8  # A and B of two layers' two projections
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_a_quantized_cache(setting: str) -> None:
    """Keys and values of 8 bits: logits of later tokens within a few percent of those of a full cache."""
    pytest.importorskip("hqq")
    model, ids = model_of(setting), ids_of()
    cache = QuantizedCache("hqq", model.config, nbits=8, axis_key=1, axis_value=1, q_group_size=16, residual_length=1)
    model(ids[:, :8], past_key_values=cache)
    model(
        ids[:, 8:9], past_key_values=cache, cache_position=torch.tensor([8])
    )  # moves what is there into the quantized part
    got = model(ids[:, 9:], past_key_values=cache, cache_position=torch.arange(9, 12)).logits
    want = model(ids).logits[:, 9:]
    assert not torch.equal(got, want)
    assert (got - want).norm() < 0.04 * want.norm()
    asked: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    settings = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16, "residual_length": 4}
    found = model.generate(ids, cache_implementation="quantized", cache_config=settings, **asked)
    assert torch.equal(found[:, :12], ids)
    assert found.shape == (2, 20)
