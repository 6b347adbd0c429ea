"""Device, precision, batch sizes, sharding: refusals with a remedy."""

from __future__ import annotations

import pytest
import torch
from support.plans import small_plan

from mohd_train.config.schema import Config, SubDimensionConfig
from mohd_train.errors import UserError
from mohd_train.train import parallel


def config(**values: object) -> Config:
    made = Config(global_train_batch_size=12)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def test_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert parallel.resolve_device("auto") == "cpu"
    with pytest.raises(UserError, match="device=cpu"):
        parallel.resolve_device("gpu")
    with pytest.raises(UserError, match="precision=fp32"):
        parallel.check_precision("amp_bf16", "cpu")
    parallel.check_precision("fp32", "cpu")


def test_batch_must_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match=r"12, which does not divide over 5 processes; .*10, 15"):
        parallel.device_batch_size(config())
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parallel.device_batch_size(config()) == 3


def test_microbatch() -> None:
    assert parallel.microbatch_size(config(), "cpu") == 12
    assert parallel.microbatch_size(config(), "gpu") == "auto"
    assert parallel.microbatch_size(config(device_train_microbatch_size=5), "cpu") == 5
    assert parallel.microbatch_size(config(device_train_microbatch_size=100), "gpu") == 12


def test_fsdp() -> None:
    assert parallel.parallelism_config(config(), "gpu") is None
    with pytest.raises(UserError, match="fsdp_config=null"):
        parallel.parallelism_config(config(fsdp_config={}), "cpu")
    with pytest.raises(UserError, match=r"unknown key 'sharding_strateg' \(did you mean 'sharding_strategy'\?\)"):
        parallel.parallelism_config(config(fsdp_config={"sharding_strateg": "FULL_SHARD"}), "gpu")
    with pytest.raises(UserError, match="balance loss"):
        parallel.parallelism_config(config(fsdp_config={"activation_checkpointing_reentrant": True}), "gpu")
    for precision in ("DEFAULT", "PURE", {"param_dtype": "bf16"}):
        with pytest.raises(UserError, match=r"mixed_precision is .*; set FULL: .* routers"):
            parallel.parallelism_config(config(fsdp_config={"mixed_precision": precision}), "gpu")
    for precision in ("FULL", {"param_dtype": "fp32", "reduce_dtype": "bf16"}):
        assert parallel.parallelism_config(config(fsdp_config={"mixed_precision": precision}), "gpu") is not None
    found = parallel.parallelism_config(config(fsdp_config={"sharding_strategy": "SHARD_GRAD_OP"}), "gpu")
    assert found is not None
    assert found["fsdp"]["state_dict_type"] == "full"
    assert found["fsdp"]["mixed_precision"] == "FULL"
    sharded = parallel.parallelism_config(config(fsdp_config={"state_dict_type": "sharded"}), "gpu")
    assert sharded is not None
    assert sharded["fsdp"]["load_planner"].allow_partial_load
    for key, value, message in (
        ("state_dict_type", "local", "full or sharded"),
        ("sharded_ckpt_prefix_dir", "ba{batch}", r"must be ep\{epoch\}-ba\{batch\}"),
        ("save_planner", "mine", "leave them out"),
    ):
        with pytest.raises(UserError, match=message):
            parallel.parallelism_config(config(fsdp_config={"state_dict_type": "sharded", key: value}), "gpu")


def test_kernels_are_settled_before_the_first_step() -> None:
    x2, dense = small_plan("x2"), small_plan("dense")
    assert parallel.resolve_kernels(config(precision="fp32"), x2, "cpu") == "grouped"
    assert parallel.resolve_kernels(config(precision="fp32", kernels="reference"), x2, "cpu") == "reference"
    assert parallel.resolve_kernels(config(precision="fp32", kernels="triton"), dense, "cpu") == "dense"
    with pytest.raises(UserError, match="use kernels: grouped"):
        parallel.resolve_kernels(config(precision="fp32", kernels="triton"), x2, "cpu")


def test_too_many_choices_for_triton_are_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked, model = config(precision="amp_bf16", kernels="triton"), {"hidden_size": 2048}
    assert parallel.resolve_kernels(asked, small_plan("75", model=model), "gpu") == "triton"
    many = SubDimensionConfig(32, 16, 1)
    with pytest.raises(UserError, match=r"300,540,195 choices .*use kernels: grouped"):
        parallel.resolve_kernels(asked, small_plan("75", model=model, attention=many, ffn=many), "gpu")


def test_the_seed_of_every_process_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer adds the rank to it."""
    parallel.check_seed(2**32 - 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    parallel.check_seed(2**32 - 8)
    with pytest.raises(UserError, match="seed is 4294967295; with 8 processes it must be at most 4294967288"):
        parallel.check_seed(2**32 - 1)
