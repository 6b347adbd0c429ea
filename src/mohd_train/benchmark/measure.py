"""Timing in turns, the check that the timed thing is right, and what else a step costs."""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohd_train.benchmark.cases import Settings, Step
from mohd_train.errors import UserError

# Relative error of a tensor's norm that a step may differ by from the same step on the reference backend. float32: sums of
# some thousand terms in another order. bfloat16: a few roundings of 2^-9 on the way, more for a gradient.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
# What the kernels' own accelerators reach in dense bfloat16, TFLOP/s (vendors' data sheets).
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


def keep_pages() -> bool:
    """Has glibc keep freed memory instead of handing each large block back, which costs a page fault per 4 KiB at the next
    allocation (for blocks over 32 MiB always). Allocators in use for CPU training (jemalloc, tcmalloc) do the same.

    Returns:
        Whether the C library has that setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3
    return mallopt is not None and bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, -1))


def clock_of(settings: Settings) -> tuple[str, Callable[[], float]]:
    """(name, clock): processor time of this process for one CPU thread, which a busy machine disturbs less; else wall time."""
    if settings.device.type == "cpu" and torch.get_num_threads() == 1:
        return "process_time", time.process_time
    return "perf_counter", time.perf_counter


def rounds(steps: dict[str, Step], count: int, settings: Settings) -> dict[str, list[float]]:
    """Seconds of every step, `count` rounds in which each takes its turn, after two rounds of warm-up."""
    _, clock = clock_of(settings)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(count + 2):
        for name, step in steps.items():
            _synchronize(settings)
            start = clock()
            step()
            _synchronize(settings)
            if index >= 2:
                times[name].append(clock() - start)
    return times


def _synchronize(settings: Settings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.synchronize()


def check_against_reference(
    name: str, step: Step, module: nn.Module, step_of: Callable[[nn.Module], Step], settings: Settings
) -> float:
    """Largest relative error of the timed step's outputs and gradients against the reference backend's.

    Raises:
        UserError: beyond the tolerance; no figure is printed for such a backend.
    """
    other = copy.deepcopy(module)
    for part in other.modules():
        if hasattr(part, "kernels"):
            setattr(part, "kernels", "reference")  # noqa: B010
    worst = 0.0
    for got, want in zip(step(), step_of(other)(), strict=True):
        error = (got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-20)
        if want.float().norm() > 0 or got.float().norm() > 0:
            worst = max(worst, error.item())
    limit = TOLERANCE[settings.dtype]
    if not worst <= limit:
        raise UserError(f"{name}: backend differs from the reference by {worst:.1e} (limit {limit:.0e}); not timed")
    return worst


def activation_bytes(step: Step, module: nn.Module) -> int:
    """Bytes that a step keeps for its backward pass, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def peak_memory(step: Step, settings: Settings) -> int | None:
    """Most bytes allocated on the accelerator during a step; None on a CPU, where the allocator doesn't tell."""
    if settings.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return int(torch.cuda.max_memory_allocated())


@dataclass
class Peak:
    """The FLOP/s that MFU is a share of, and where the number is from."""

    flops: float
    source: str
    measured: bool = False

    def again(self, settings: Settings) -> None:
        """Measures once more where it was measured: a peak taken while the machine was busy would flatter every MFU."""
        if self.measured:
            self.flops = max(self.flops, _fastest_product(settings))


def peak_flops(settings: Settings, given: float | None) -> Peak:
    """What the user states, the data sheet's, or on a CPU large matrix products measured here.

    Raises:
        UserError: an accelerator that is not in the list, and no peak given.
    """
    if given is not None:
        return Peak(given * 1e12, "given")
    if settings.device.type == "cuda":
        name = torch.cuda.get_device_name()
        for key, value in PEAKS.items():
            if key in name:
                return Peak(value * 1e12, f"data sheet, {key}, dense bfloat16")
        raise UserError(f"no peak known for {name}; give --peak-tflops")
    return Peak(_fastest_product(settings), "measured before and after the rounds, 2048 x 2048 matrix products", True)


def _fastest_product(settings: Settings) -> float:
    a, size = torch.randn(2048, 2048).to(settings.dtype), 2048
    _, clock = clock_of(settings)
    best, spent = float("inf"), 0.0
    while spent < 1.0:  # seconds
        start = clock()
        a @ a
        taken = clock() - start
        best, spent = min(best, taken), spent + taken
    return 2 * size**3 / best


@contextmanager
def profiled(settings: Settings) -> Iterator[Any]:
    """A profiler over the device's activities."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        yield profile
