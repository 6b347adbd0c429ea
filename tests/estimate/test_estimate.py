"""The whole estimate: steps, time, disk, data; as text, JSON and from the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.train_support import ROOT, make_config, make_data, write_config

from mohd_train.config.load import load_config
from mohd_train.config.plan import make_plan
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.estimate.hardware import GPUS, default_mfu, gpu_named
from mohd_train.estimate.launch import Estimate, checkpoint_bytes, checkpoints, estimate, prepared, run_steps
from mohd_train.estimate.report import render
from mohd_train.model.count import count
from mohd_train.model.llama import Transformer
from mohd_train.train.optimizer import build_optimizer

A100 = GPUS["a100-80gb"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimate")
    make_data(path / "data")
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return make_config(folder, folder / "data", "save_num_checkpoints_to_keep=1")


@pytest.fixture(scope="module")
def found(config: Config) -> Estimate:
    return estimate(config, A100, 2, mfu=0.5)


def test_numbers_of_a_small_run(config: Config, found: Estimate) -> None:
    counts = count(make_plan(config.model, config.mohd, config.max_seq_len))
    assert (found.parameters, found.activated) == (counts.parameters, counts.activated)
    assert (found.steps, found.tokens_per_step, found.device_batch, found.microbatch) == (6, 8 * 16, 4, 4)
    assert found.flops_per_step == 3 * counts.flops_per_token * 128
    assert found.step_seconds == pytest.approx(found.flops_per_step / (2 * 156e12 * 0.5))  # fp32: TF32
    assert found.tokens_per_second * found.step_seconds == pytest.approx(128)
    assert found.fits
    assert found.largest_microbatch == 4
    assert (found.checkpoints, found.disk) == (3, 2 * found.checkpoint)  # every 2 of 6; one kept, and one being written
    assert found.tokens_needed == {"cc": 36 * 16, "wiki": 12 * 16}  # 48 samples, 3 to 1
    assert found.tokens_available == {"cc": 60 * 16, "wiki": 60 * 16}
    assert found.notes == []


def test_a_checkpoint_is_as_large_as_torch_writes_it(config: Config) -> None:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=64, vocab_size=2048))
    plan = make_plan(config.model, config.mohd, config.max_seq_len)
    model = Transformer(plan, seed=0)
    optimizer = build_optimizer(model, config.optimizer)
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert checkpoint_bytes(count(plan)) == pytest.approx(file.tell(), rel=0.03)


def test_lengths_in_every_unit(config: Config, folder: Path) -> None:
    manifest = prepared(config)
    for duration, steps in (("6ba", 6), ("50sp", 7), ("129tok", 2), ("2ep", 30)):
        assert run_steps(dataclasses.replace(config, max_duration=duration), manifest) == steps
    for interval, written in (("4ba", 2), ("0.5dur", 2), ("256tok", 3), ("1ep", 1)):
        assert checkpoints(dataclasses.replace(config, save_interval=interval), 6, manifest)[0] == written
    for keep, every, held in ((-1, None, 50), (3, None, 4), (3, "10ba", 14), (1, "4ba", 27), (60, None, 50)):
        kept = dataclasses.replace(config, save_num_checkpoints_to_keep=keep, save_keep_every=every)
        assert checkpoints(kept, 100, manifest) == (50, held)
    with pytest.raises(UserError, match="max_duration is 2ep, and an epoch's length depends on the data"):
        run_steps(dataclasses.replace(config, max_duration="2ep"), None)


def test_the_papers_run_without_data() -> None:
    files = [str(ROOT / "configs" / name) for name in ("recipe/paper_50b.yaml", "model/355m.yaml", "mohd/dense.yaml")]
    eight, whole = "device_train_microbatch_size=8", "fsdp_config.activation_checkpointing=false"
    dense = estimate(load_config(files, ["data.local=/nowhere", eight, whole]), A100, 8)
    assert dense.steps * dense.tokens_per_step == 50_000 * 256 * 4096
    assert sum(dense.tokens_needed.values()) == pytest.approx(52.4e9, rel=0.001)
    assert set(dense.tokens_available.values()) == {None}
    assert any("the available tokens are unknown" in note for note in dense.notes)
    assert dense.disk == 6 * dense.checkpoint  # 5 are kept
    fewer = estimate(load_config(files, [eight, "fsdp_config.activation_checkpointing=true"]), A100, 8)
    assert fewer.needed < dense.needed / 2
    assert fewer.mfu == pytest.approx(dense.mfu * 0.75)
    assert fewer.days == pytest.approx(dense.days / 0.75)
    auto = estimate(load_config(files, ["device_train_microbatch_size=auto", whole]), A100, 8)
    assert auto.microbatch == auto.largest_microbatch == dense.largest_microbatch
    assert auto.fits


@pytest.mark.parametrize(("model", "mohd"), [("1.13b", "x4"), ("2.7b", "dense")])
def test_the_recipes_fit_80_gb(model: str, mohd: str) -> None:
    files = [str(ROOT / "configs" / part) for part in (f"model/{model}.yaml", f"mohd/{mohd}.yaml")]
    paper, ablation = (
        load_config([str(ROOT / f"configs/recipe/{name}.yaml"), *files]) for name in ("paper_50b", "ablation_10b")
    )
    assert estimate(paper, A100, 8).fits
    for key in ("device_train_microbatch_size", "fsdp_config", "max_seq_len", "precision", "device_eval_batch_size"):
        assert getattr(paper, key) == getattr(ablation, key), key


def test_defaults_of_mfu_state_their_source(config: Config) -> None:
    moe, dense = (make_plan(config.model, mohd, 16) for mohd in (config.mohd, type(config.mohd)()))
    assert default_mfu(A100, dense, False)[0] == 0.45
    share, source = default_mfu(A100, moe, False)
    assert share == pytest.approx(0.45 * 0.63)
    assert "OLMoE" in source


def test_what_is_wrong_or_left_out_is_noted(config: Config) -> None:
    odd = dataclasses.replace(
        config, max_seq_len=8, compile=True, fsdp_config={"mixed_precision": "PURE"}, device_train_microbatch_size=2
    )
    odd.data = dataclasses.replace(config.data, domains={"cc": 1.0, "book": 1.0}, optional_domains=["book"])
    text = render(estimate(odd, A100, 2))
    for note in (
        "data lacks book",
        "samples have 16 tokens",
        "without torch.compile",
        "mixed_precision=FULL, not PURE",
    ):
        assert note in text


def test_refusals(config: Config) -> None:
    with pytest.raises(UserError, match="global_train_batch_size is 8, which does not divide over 3 GPUs"):
        estimate(config, A100, 3)
    with pytest.raises(UserError, match=r"--gpu 'a100-80' is unknown \(did you mean 'a100-80gb'\?\)"):
        gpu_named("a100-80")
    lacking = dataclasses.replace(config, data=dataclasses.replace(config.data, domains={"arxiv": 1.0}))
    with pytest.raises(UserError, match=r"data\.domains has 'arxiv', which .* lacks"):
        estimate(lacking, A100, 2)


def test_a_run_that_does_not_fit_says_so(found: Estimate) -> None:
    text = render(dataclasses.replace(found, largest_microbatch=0, free_disk=1))
    assert "DOES NOT FIT" in text
    assert "not one sample fits" in text
    assert "NOT ENOUGH" in text
    assert "the largest microbatch that fits is 4, all of a GPU's batch" in render(found)


def test_command_line(folder: Path) -> None:
    file = write_config(folder, folder / "data")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/estimate.py"), str(file), "--gpus", "2"]
    done = subprocess.run([*command, "--gpu", "h200", "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["gpu"], answer["gpus"], answer["fits"]) == ("H200 SXM", 2, True)
    done = subprocess.run([*command, "--mfu", "1.5"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "give a number above 0" in done.stderr
