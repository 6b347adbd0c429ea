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
from support.routing import choose

from mohd_train.kernels import ops
from mohd_train.kernels.selection import same_choice

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
GEMMS = [kernel for kernel in MODULES["triton_kernels"] if "scale" not in kernel]
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
    size = triton_launch.sizes_of(function, 64, capability)[0]
    done = compiled(module, kernel, {**size.blocks, "C": 96}, capability, size.warps, size.stages)
    assert done.asm["cubin"]
    assert done.metadata.shared <= SHARED_LIMIT[capability]
    if kernel in GEMMS:
        assert "mma" in done.asm["ptx"]  # tensor cores
        assert "cp.async" in done.asm["ptx"]  # loads wide enough to go to shared memory in the background


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "tile"), [(kernel, tile) for kernel in GEMMS for tile in ((64,) if "weight" in kernel else (64, 128))]
)
def test_no_block_size_spills_registers_or_wants_too_much_shared_memory(
    kernel: str, tile: int, capability: int, tmp_path: Path
) -> None:
    """Each that may be chosen, at width 256, read from what the assembler says of its registers."""
    import triton

    from mohd_train.kernels import triton_kernels, triton_launch

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for size in triton_launch.sizes_of(getattr(triton_kernels, kernel), tile, capability):
        sizes = {"BM": tile, **size.blocks, "C": 256}
        done = compiled("triton_kernels", kernel, sizes, capability, size.warps, size.stages)
        assert done.metadata.shared <= SHARED_LIMIT[capability]
        (tmp_path / "kernel.ptx").write_text(done.asm["ptx"])
        command = [assembler, "-v", f"-arch=sm_{capability}{'a' if capability == 90 else ''}", "kernel.ptx"]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "0 bytes spill stores, 0 bytes spill loads" in said.stdout + said.stderr, size


@pytest.mark.parametrize(("kernel", "width"), [("contract_kernel", 64), ("expand_kernel", 192), ("swiglu_kernel", 512)])
def test_largest_block_sizes_fit_the_smaller_gpu(kernel: str, width: int) -> None:
    from mohd_train.kernels import triton_kernels, triton_launch

    for tile in (64, 128):
        size = triton_launch.sizes_of(getattr(triton_kernels, kernel), tile, 80)[-1]
        sizes = {"BM": tile, **size.blocks, "C": width}
        done = compiled("triton_kernels", kernel, sizes, 80, size.warps, size.stages)
        assert done.metadata.shared <= SHARED_LIMIT[80]


@pytest.mark.parametrize(
    ("tokens", "active", "n", "shared", "tile"),
    [(16384, 4, 16, 3, 128), (8192, 4, 16, 3, 64), (16384, 12, 16, 9, 64), (65536, 12, 16, 9, 128), (1, 4, 4, 4, 64)],
)
def test_tiles_are_large_where_little_is_wasted(tokens: int, active: int, n: int, shared: int, tile: int) -> None:
    assert ops.triton_tile(tokens, active, n, shared) == tile
    if tile == 128:
        chosen = same_choice(choose(tokens, n, active, shared), n, shared, tile)
        used = (chosen >= 0).any(1).sum() * tile
        assert used <= tokens * 17 / 16 + tile


@pytest.mark.parametrize(("n", "active", "shared"), [(8, 4, 3), (16, 12, 9), (32, 16, 0), (256, 20, 4)])
def test_a_tile_holds_tokens_of_one_choice(n: int, active: int, shared: int) -> None:
    """Also where a choice as one number is past 2^63: the second choice differs from the first in its first place alone."""
    base = torch.arange(n - active, n)
    choices = torch.stack([base, base, torch.cat([base[:-2] - 1, base[-2:]])])
    choices[1, shared] -= 1
    choices[:, :shared] = torch.arange(shared)
    indices = choices[torch.arange(40) * 7 % 3]
    tiles = same_choice(indices, n, shared, 4)
    for tile in tiles:
        held = indices[tile[tile >= 0]]
        assert (held == held[:1]).all()
    assert torch.equal(tiles[tiles >= 0].sort().values, torch.arange(40))


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
    for size in triton_launch.sizes_of(function, 128, 90):
        assert set(size.blocks) <= set(function.arg_names)
    assert set(triton_launch.KEYS) & set(function.arg_names)
