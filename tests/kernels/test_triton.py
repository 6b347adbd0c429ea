"""The triton backend without a GPU: results in the interpreter, and compilation for sm80 and sm90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
POINTERS = {
    "contract_kernel": ("x", "w", "out"),
    "expand_kernel": ("h", "w", "out"),
    "weight_grad_kernel": ("x", "h", "grad"),
    "fuse_kernel": ("z", "residual", "out"),
    "fuse_grad_z_kernel": ("grad", "grad_z"),
    "fuse_grad_mixing_kernel": ("grad", "z"),
}
FLOAT32 = ("mixing", "grad_mixing")
INDEX = ("tile_tokens", "indices", "pairs", "ends")
SIZES: dict[str, Any] = {"K": 4, "S": 3, "BM": 64, "BN": 64, "BK": 32, "BO": 64, "BT": 16, "PRECISION": "ieee"}


def test_interpreted_results_equal_the_reference() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = [sys.executable, str(HERE / "triton_interpreted.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 4


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 96, 256])
@pytest.mark.parametrize("kernel", POINTERS)
def test_compiles_for(kernel: str, width: int, capability: int) -> None:
    """To machine code, bfloat16, within the shared memory a program may take. 96 is a width that no block divides."""
    if width != 96 and kernel.startswith("fuse"):
        pytest.skip("one width is enough for the pointwise kernels")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mohd_train.kernels import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants = {**SIZES, "C": width, "BC": 64}
    signature = {}
    for name in function.arg_names:
        if name in POINTERS[kernel] or name in FLOAT32:
            signature[name] = "*fp32" if name in FLOAT32 else "*bf16"
        elif name in INDEX:
            signature[name] = "*i64"
        else:
            signature[name] = "constexpr" if name in constants else "i32"
    used = {name: value for name, value in constants.items() if signature.get(name) == "constexpr"}
    source = ASTSource(function, signature, used)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    limit = 163 if capability == 80 else 227  # KiB of shared memory a program may take
    assert compiled.metadata.shared <= limit * 1024


def test_refused_where_it_cannot_run() -> None:
    from mohd_train.kernels import triton_ops

    cpu = torch.device("cpu")
    assert "CUDA" in (triton_ops.refusal(cpu, torch.float32, 64) or "")
