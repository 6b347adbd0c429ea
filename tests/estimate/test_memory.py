"""Estimated memory against what a real step on the CPU takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from estimate.measure_support import SETTINGS, measure_step, memory_of, saved_bytes, small_plan

from mohd_train.estimate.activations import trace
from mohd_train.estimate.hardware import GIB
from mohd_train.estimate.memory import MemoryModel, Sharding, sharding
from mohd_train.kernels.selection import paths_as_on


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_saved_bytes_are_exact(setting: str, precision: str, device: str) -> None:
    """By the path that the products take on either device."""
    plan = small_plan(setting, layers=3, seq=32)
    with paths_as_on(device):
        measured = saved_bytes(plan, 3, precision)
    assert trace(plan, precision, gpu=device == "cuda").total(layers=3, samples=3) == measured


def test_saved_bytes_are_exact_with_grouped_query_attention() -> None:
    for precision in ("fp32", "amp_bf16"):
        plan = small_plan("x2", layers=1, seq=64, kv_heads=2)
        assert trace(plan, precision, gpu=False).total(layers=1, samples=5) == saved_bytes(plan, 5, precision)


def test_a_gpu_keeps_no_scores_of_grouped_queries() -> None:
    """Half as many keys and values: that much less of them is kept, and of their weights' copies; nothing else changes."""
    plans = (small_plan("dense", seq=64), small_plan("dense", seq=64, kv_heads=2))
    whole, grouped = (trace(plan, "amp_bf16") for plan in plans)
    assert whole == trace(plans[0], "amp_bf16", gpu=False)
    assert (
        whole.block_per_sample - grouped.block_per_sample == 2 * 64 * 64 * 2
    )  # keys and values, T, half the width, bytes
    assert whole.block_fixed - grouped.block_fixed == 2 * 128 * 64 * 2


def test_tracing_leaves_the_random_state_alone_and_takes_no_memory_for_a_large_model() -> None:
    before = torch.get_rng_state()
    plan = dataclasses.replace(small_plan("x2"), vocab_size=1 << 20, intermediate_size=1 << 18)  # 40 GB of parameters
    assert trace(plan, "amp_bf16").fixed > 1 << 30
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("setting", "sizes", "precision", "checkpointing"),
    [
        ("dense", {}, "fp32", False),
        ("dense", {"hidden": 256, "ffn": 1024, "layers": 2, "vocab": 4096}, "amp_bf16", False),
        ("50", {"layers": 6}, "amp_bf16", False),
        ("x2", {}, "fp32", False),
        ("x2", {"seq": 512, "layers": 2}, "amp_bf16", False),
        ("dense", {"layers": 8, "seq": 512}, "fp32", True),
        ("50", {"hidden": 256, "ffn": 512, "seq": 512}, "fp32", True),
        ("x2", {"layers": 6, "seq": 512}, "fp32", True),
    ],
)
def test_peak_of_a_step(setting: str, sizes: dict, precision: str, checkpointing: bool) -> None:
    plan = small_plan(setting, **sizes)
    measured = measure_step(plan, 4, precision, checkpointing=checkpointing)
    memory = memory_of(plan, 4, precision, checkpointing=checkpointing)
    stages = memory.stages(4)
    peak = max(sum(stages[name].values()) for name in ("loss", "backward", "optimizer"))
    standing = sum(memory.standing().values()) + memory.gradients()
    assert standing == pytest.approx(
        measured.standing, rel=0.001
    )  # Adam counts its steps too, 4 bytes a parameter tensor
    assert peak == pytest.approx(measured.peak, rel=0.08)
    assert peak - standing == pytest.approx(measured.above, rel=0.08)


def test_sharding_follows_the_config() -> None:
    assert sharding(None, 8) == Sharding(1, None, True, False)
    assert sharding(None, 1) == Sharding(1, None, False, False)
    full = {"sharding_strategy": "FULL_SHARD", "activation_checkpointing": True}
    assert sharding(full, 16) == Sharding(16, "FULL_SHARD", True, True)
    assert sharding({"sharding_strategy": "HYBRID_SHARD"}, 16).shards == 8
    assert sharding({"sharding_strategy": "NO_SHARD"}, 16).shards == 1


def _large(shards: Sharding, precision: str = "amp_bf16") -> MemoryModel:
    memory = memory_of(small_plan("x2", hidden=512, ffn=2048, layers=8, vocab=32000, seq=2048), 8, precision)
    return dataclasses.replace(memory, sharding=shards, device_batch=64)


def test_fsdp_shards_what_ddp_holds_whole() -> None:
    ddp, fsdp = _large(Sharding(1, None, True, False)), _large(Sharding(8, "FULL_SHARD", True, False))
    whole = ddp.parameters
    assert ddp.standing() == {"weights": whole, "optimizer": 2 * whole}
    assert ddp.gradients() == 2 * whole  # DDP's buckets
    assert fsdp.standing() == {"weights": whole // 8, "optimizer": 2 * whole // 8}
    assert fsdp.gathered(backward=False) == fsdp.root + 2 * fsdp.block
    assert fsdp.root + 8 * fsdp.block == pytest.approx(whole, rel=1e-6)
    zero2 = dataclasses.replace(fsdp, sharding=Sharding(8, "SHARD_GRAD_OP", True, False))
    assert zero2.gathered(backward=False) == whole
    assert fsdp.needed(8) < zero2.needed(8)


def test_the_largest_microbatch_fits_and_one_more_does_not() -> None:
    memory = _large(Sharding(8, "FULL_SHARD", True, False))
    for budget in (10 * GIB, 20 * GIB):
        largest = memory.largest(budget)
        assert 0 < largest < memory.device_batch
        assert memory.needed(largest) <= budget < memory.needed(largest + 1)
    assert memory.largest(GIB) == 0
    assert memory.largest(10_000 * GIB) == memory.device_batch


def test_checkpointing_takes_less() -> None:
    plain = _large(Sharding(8, "FULL_SHARD", True, False))
    recomputing = _large(Sharding(8, "FULL_SHARD", True, True))
    assert recomputing.peak(16)[1]["activations"] < plain.peak(16)[1]["activations"] / 3
