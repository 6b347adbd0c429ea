"""Timing steps in turn, checking them against the reference, and what else a step costs."""

from __future__ import annotations

import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mohd_train.benchmark.cases import Step, Workload, build
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError

# The relative error, in norm, that a tensor of a step may have against the same step on the reference backend. float32: sums
# of some thousand terms in another order. bfloat16: a few roundings of 2^-9, and the tokens for which the FFN's router, whose input
# is rounded, chooses differently.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# Dense bfloat16 peaks, TFLOP/s (the vendor's data sheets)
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


def keep_pages() -> bool:
    """Makes glibc keep freed memory, as the allocators used for CPU training (jemalloc, tcmalloc) do. By default it returns every
    block over 32 MiB to the system, and the next allocation costs a page fault for each 4 KiB.

    Returns:
        Whether the C library has that setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3
    return mallopt is not None and bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, -1))


def clock_of(workload: Workload) -> tuple[str, Callable[[], float]]:
    """(name, clock): the processor time of this process for one CPU thread, as a busy machine affects it less; else wall time."""
    if workload.device.type == "cpu" and torch.get_num_threads() == 1:
        return "process_time", time.process_time
    return "perf_counter", time.perf_counter


def rounds(steps: dict[str, Step], count: int, workload: Workload) -> dict[str, list[float]]:
    """Seconds of every step in `count` rounds, after two rounds of warm-up. In a round the steps take turns."""
    _, clock = clock_of(workload)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(count + 2):
        for name, step in steps.items():
            _synchronize(workload)
            start = clock()
            step()
            _synchronize(workload)
            if index >= 2:
                times[name].append(clock() - start)
    return times


def _synchronize(workload: Workload) -> None:
    if workload.device.type == "cuda":
        torch.cuda.synchronize()


def check_against_reference(
    name: str, step: Step, module: nn.Module, step_of: Callable[..., Step], workload: Workload
) -> float:
    """The largest relative error of the step's outputs and gradients against those of the reference backend.

    In reduced precision the choices of some tokens differ, more with every layer: after 24 layers at initialization the gradients
    of two correct backends have little in common. There a whole model is compared only by its loss; the gradients of one of its
    blocks are compared in mode layer (`compare`).

    Raises:
        UserError: the error is above the tolerance; such a backend is not timed.
    """
    other = copy.deepcopy(module)
    for part in other.modules():
        if hasattr(part, "kernels"):
            setattr(part, "kernels", "reference")  # noqa: B010
    got = step()
    if workload.mode == "train" and workload.dtype != torch.float32:
        finite = all(part.isfinite().all() for part in got)
        got = got[:1] if finite else [got[0] * float("nan")]
        want = step_of(other, mode="forward")()
    else:
        want = step_of(other)()
    off = [(a.float() - b.float()).norm().item() for a, b in zip(got, want, strict=True)]
    norms = [part.float().norm().item() for part in want]
    errors = [error / max(norm, 1e-20) for error, norm in zip(off, norms, strict=True) if error or norm]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
    limit = TOLERANCE[workload.dtype]
    if not worst <= limit:
        raise UserError(f"{name}: backend differs from the reference by {worst:.1e} (limit {limit:.0e}); not timed")
    return worst


def check_peer(name: str, step: Step, plan: ModelPlan, workload: Workload) -> float:
    """The relative error of a peer's output (its loss, its logits) against our dense model's, which has the same weights.

    Raises:
        UserError: it computes something else, so that its time would say nothing.
    """
    ours, _, _ = build(plan, replace(workload, compile=False))
    got, want = step()[0].float(), ours()[0].float()
    error = ((got - want).norm() / want.norm()).item()
    if not error <= TOLERANCE[workload.dtype]:
        raise UserError(f"{name}: its output differs from our dense model's by {error:.1e}; not timed")
    return error


def activation_bytes(step: Step, module: nn.Module) -> int:
    """Bytes that a step saves for its backward pass: each storage once, without parameters."""
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


def peak_memory(step: Step, workload: Workload) -> int | None:
    """The most bytes allocated on the GPU during a step; None on a CPU, whose allocator keeps no such record."""
    if workload.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return int(torch.cuda.max_memory_allocated())


@dataclass
class Peak:
    """The FLOP/s that MFU is a share of, and where the number comes from."""

    flops: float
    source: str
    measured: bool = False

    def remeasure(self, workload: Workload) -> None:
        """Measures a measured peak once more: one taken while the machine was busy would make every MFU too high."""
        if self.measured:
            self.flops = max(self.flops, _fastest_product(workload))


def peak_flops(workload: Workload, given: float | None) -> Peak:
    """The peak that the user gives, the data sheet's, or on a CPU that of large matrix products, measured here.

    Raises:
        UserError: no peak given, and none is known for the GPU.
    """
    if given is not None:
        return Peak(given * 1e12, "given")
    if workload.device.type == "cuda":
        name = torch.cuda.get_device_name()
        for key, value in PEAKS.items():
            if key in name:
                return Peak(value * 1e12, f"data sheet, {key}, dense bfloat16")
        raise UserError(f"no peak known for {name}; give --peak-tflops")
    return Peak(_fastest_product(workload), "measured before and after the rounds, 2048 x 2048 matrix products", True)


def _fastest_product(workload: Workload) -> float:
    a, size = torch.randn(2048, 2048).to(workload.dtype), 2048
    _, clock = clock_of(workload)
    best, spent = float("inf"), 0.0
    while spent < 1.0:  # seconds
        start = clock()
        a @ a
        taken = clock() - start
        best, spent = min(best, taken), spent + taken
    return 2 * size**3 / best


@contextmanager
def profiled(workload: Workload) -> Iterator[Any]:
    """A profiler over the device's activities."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if workload.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        yield profile
