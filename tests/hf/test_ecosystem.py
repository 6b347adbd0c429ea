"""Fine-tuning clients that the project doesn't depend on: ``make test-ecosystem`` brings them into a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hf.test_clients import model_of
from support.native import save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
