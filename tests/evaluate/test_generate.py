from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.native import save_native, save_sharded
from support.plans import small_plan

from mohd_train.errors import UserError
from mohd_train.evaluate.generate import generate
from mohd_train.hf.export import export
from mohd_train.model.llama import Transformer


def test_every_kind_of_checkpoint_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = small_plan("x2")
    model = Transformer(plan, seed=3).eval()
    file = save_native(tmp_path / "run", plan, model)
    sharded = save_sharded(tmp_path / "sharded", plan, model)
    export(file, tmp_path / "out", check=False)
    said = [generate(path, "w5 w6", max_new_tokens=5, device="cpu") for path in (file, sharded, tmp_path / "out")]
    assert said[0] == said[1] == said[2]
    ids = [1, 5, 6]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert said[0].split() == [f"w{i}" for i in ids[3:] if i > 3]
    printed = capsys.readouterr()
    assert printed.out.count("w5 w6") == 3
    assert printed.err.count("tokens/s after the first") == 3


def test_sampling_repeats_with_its_seed(tmp_path: Path) -> None:
    plan = small_plan("x2")
    file = save_native(tmp_path / "run", plan, Transformer(plan, seed=3))
    said = [generate(file, "w5", max_new_tokens=12, temperature=1.5, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_context_that_is_too_short_is_named(tmp_path: Path) -> None:
    plan = small_plan("x2")
    file = save_native(tmp_path / "run", plan, Transformer(plan, seed=3))
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        generate(file, "w5 w6", max_new_tokens=62, device="cpu")
