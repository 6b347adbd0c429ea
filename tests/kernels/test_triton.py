"""The triton backend without a GPU: results in the interpreter, and compilation for sm80 and sm90."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
MODULES = {
    "triton_kernels": (
        "contract_kernel", "swiglu_kernel", "swiglu_grad_kernel", "expand_kernel", "scale_grad_kernel",
        "weight_grad_kernel",
    ),
    "triton_fusion": ("fuse_kernel", "fuse_grad_z_kernel", "fuse_grad_mixing_kernel"),
    "triton_norm": ("norm_router_kernel", "norm_router_grad_x_kernel", "norm_router_grad_weights_kernel"),
}  # fmt: skip
KERNELS = [(module, kernel) for module, kernels in MODULES.items() for kernel in kernels]
FLOAT32 = ("mixing", "grad_mixing", "scale", "grad_scale", "gain", "centroids", "logits", "grad_logits", "rstd",
           "grad_gain", "grad_centroids")  # fmt: skip
INDEX = ("tile_tokens", "indices", "pairs", "ends")
SIZES: dict[str, Any] = {"K": 4, "S": 3, "N": 16, "NP": 16, "BM": 64, "PRECISION": "ieee", "COUNT": 3, "SCALED": True}
NUMBERS = ("OUT", "OUT0", "OUT1", "OUT2", "T", "D", "N", "ROWS", "SPAN", "w_stride_d", "w_stride_o")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may take


def test_interpreted_results_equal_the_reference() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = [sys.executable, str(HERE / "triton_interpreted.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 5


def compiled(module: str, kernel: str, sizes: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """`kernel` as machine code, bfloat16, without a GPU; weights as `torch.nn.Linear` holds those of an up-projection."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"mohd_train.kernels.{module}"), kernel)
    sizes = {**SIZES, "w_stride_d": 1, **sizes}
    signature, used, aligned = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(function.arg_names, function.params, strict=True)):
        if parameter.is_constexpr or name == "w_stride_d":
            signature[name], used[name] = "constexpr", sizes[name]
        elif name in INDEX:
            signature[name] = "*i64"
        else:
            signature[name] = "fp32" if name == "eps" else "i32" if name in NUMBERS else "*bf16"
            signature[name] = "*fp32" if name in FLOAT32 else signature[name]
        if signature[name] != "constexpr" and name not in ("eps", "T", "ROWS", "SPAN"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, used, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("module", "kernel"), KERNELS)
def test_compiles_for(module: str, kernel: str, capability: int) -> None:
    """Every kernel at width 96, which no block divides, with the first of its block sizes."""
    from mohd_train.kernels import triton_launch

    function = getattr(importlib.import_module(f"mohd_train.kernels.{module}"), kernel)
    sizes, warps, stages = triton_launch._sizes(function)[0]
    done = compiled(module, kernel, {**sizes, "C": 96}, capability, warps, stages)
    assert done.asm["cubin"]
    assert done.metadata.shared <= SHARED_LIMIT[capability]
    if module == "triton_kernels" and "scale" not in kernel:
        assert "mma" in done.asm["ptx"]  # tensor cores
        assert "cp.async" in done.asm["ptx"]  # loads wide enough to go to shared memory in the background


@pytest.mark.parametrize(("kernel", "width"), [("contract_kernel", 64), ("expand_kernel", 192), ("swiglu_kernel", 512)])
def test_largest_block_sizes_fit_the_smaller_gpu(kernel: str, width: int) -> None:
    from mohd_train.kernels import triton_launch

    sizes, warps, stages = triton_launch.GEMM_SIZES[-1]
    done = compiled("triton_kernels", kernel, {**sizes, "C": width}, 80, warps, stages)
    assert done.metadata.shared <= SHARED_LIMIT[80]


def test_refused_where_it_cannot_run() -> None:
    from mohd_train.kernels import triton_ops

    cpu = torch.device("cpu")
    assert "CUDA" in (triton_ops.refusal(cpu, torch.float32, 64) or "")


def test_a_width_no_kernel_serves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mohd_train.kernels import triton_ops

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    for width in (64, 96, 192, 512):
        assert triton_ops.refusal(cuda, torch.bfloat16, width) is None
    for width in (32, 80, 544):
        assert "64 to 512 in steps of 32" in (triton_ops.refusal(cuda, torch.bfloat16, width) or "")


@pytest.mark.parametrize(("module", "kernel"), KERNELS)
def test_block_sizes_to_choose_among_fit_the_kernel(module: str, kernel: str) -> None:
    """A tuned kernel takes every name of its block sizes, and at least one to tell shapes apart by."""
    from mohd_train.kernels import triton_launch

    function = getattr(importlib.import_module(f"mohd_train.kernels.{module}"), kernel)
    for sizes, _, _ in triton_launch._sizes(function):
        assert set(sizes) <= set(function.arg_names)
    assert set(triton_launch.KEYS) & set(function.arg_names)
