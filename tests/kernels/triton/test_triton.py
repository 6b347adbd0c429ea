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

from mohd_train.config.plan import SubDimPlan
from mohd_train.errors import UserError
from mohd_train.kernels import ops
from mohd_train.kernels.selection import same_choice

pytest.importorskip("triton")

HERE = Path(__file__).parent
MODULES = {
    "gemm": ("contract_kernel", "expand_kernel", "weight_grad_kernel"),
    "ffn": ("swiglu_kernel", "swiglu_grad_kernel"),
    "projections": ("scale_grad_kernel",),
    "fusion": ("fuse_kernel", "fuse_grad_z_kernel", "fuse_grad_mixing_kernel"),
    "norm_router": ("norm_router_kernel", "norm_router_grad_x_kernel", "norm_router_grad_weights_kernel"),
}
KERNELS = [(module, name) for module, names in MODULES.items() for name in names]
GEMMS = [(module, name) for module, name in KERNELS if module in ("gemm", "ffn")]
FLOAT32 = ("mixing", "grad_mixing", "scale", "grad_scale", "norm_weight", "centroids", "logits", "grad_logits", "rstd",
           "grad_weight", "grad_centroids", "part0", "part1", "part2")  # fmt: skip
INDEX = ("tile_tokens", "indices", "pairs", "ends")
SIZES: dict[str, Any] = {"K": 4, "S": 3, "N": 16, "NP": 16, "BM": 64, "PRECISION": "ieee", "COUNT": 3, "SCALED": True,
                         "PARTS": 3}  # fmt: skip
STRIDES = ("w_stride_d", "part_stride_d")  # 1, in weights as `torch.nn.Linear` holds those of an up-projection
NUMBERS = ("OUT", "OUT0", "OUT1", "OUT2", "T", "D", "N", "ROWS", "SPAN", "w_stride_o", "part_stride_o")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may take


def test_interpreted_results_equal_the_reference() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = [sys.executable, str(HERE / "interpreted.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 6


def kernel_of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"mohd_train.kernels.triton.{module}"), name)


def compiled(kernel: Any, sizes: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """`kernel` as machine code, bfloat16, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.function
    sizes = {**SIZES, **dict.fromkeys(STRIDES, 1), **sizes}
    signature, used, aligned = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(function.arg_names, function.params, strict=True)):
        if parameter.is_constexpr or name in STRIDES:
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
@pytest.mark.parametrize(("module", "name"), KERNELS)
def test_compiles_for(module: str, name: str, capability: int) -> None:
    """Every kernel at width 96, which no block divides, with the first of its block sizes."""
    kernel = kernel_of(module, name)
    size = kernel.sizes(64, capability)[0]
    done = compiled(kernel, {**size.blocks, "C": 96, "PARTS": 1}, capability, size.warps, size.stages)
    assert done.asm["cubin"]
    assert done.metadata.shared <= SHARED_LIMIT[capability]
    if (module, name) in GEMMS:
        assert "mma" in done.asm["ptx"]  # tensor cores
        assert "cp.async" in done.asm["ptx"]  # loads wide enough to go to shared memory in the background


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("module", "name", "tile"),
    [(module, name, tile) for module, name in GEMMS for tile in ((64,) if "weight" in name else (64, 128))],
)
def test_every_block_size_has_one_loop_with_its_copies_ahead_and_spills_no_registers(
    module: str, name: str, tile: int, capability: int, tmp_path: Path
) -> None:
    """All that may be chosen, at width 256. A tile goes through all its slices, and all weights, in one loop: in it a copy to
    shared memory for each operand, and `stages - 1` more of each before it. Spills by the assembler's own account."""
    import triton

    kernel = kernel_of(module, name)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    operands = 3 if name == "swiglu_kernel" else 2
    for size in kernel.sizes(tile, capability):
        sizes = {"BM": tile, **size.blocks, "C": 256}
        done = compiled(kernel, sizes, capability, size.warps, size.stages)
        assert done.metadata.shared <= SHARED_LIMIT[capability]
        before, *loops = done.asm["ttgir"].split("scf.for")
        assert len(loops) == 1
        assert loops[0].partition("scf.yield")[0].count("async_copy_global_to_local") == operands, size
        assert before.count("async_copy_global_to_local") == operands * (size.stages - 1), size
        (tmp_path / "kernel.ptx").write_text(done.asm["ptx"])
        command = [assembler, "-v", f"-arch=sm_{capability}{'a' if capability == 90 else ''}", "kernel.ptx"]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "0 bytes spill stores, 0 bytes spill loads" in said.stdout + said.stderr, size


@pytest.mark.parametrize(
    ("module", "name", "width"),
    [("gemm", "contract_kernel", 64), ("gemm", "expand_kernel", 192), ("ffn", "swiglu_kernel", 512)],
)
def test_largest_block_sizes_fit_the_smaller_gpu(module: str, name: str, width: int) -> None:
    kernel = kernel_of(module, name)
    for tile in (64, 128):
        size = kernel.sizes(tile, 80)[-1]
        sizes = {"BM": tile, **size.blocks, "C": width}
        done = compiled(kernel, sizes, 80, size.warps, size.stages)
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


@pytest.mark.parametrize(
    ("tokens", "shared", "width", "widths", "parts"),
    [
        (16384, 3, 256, [1024, 0, 0], 8),  # down-projection: 48 blocks
        (16384, 3, 256, [1024, 1024, 1024], 2),
        (16384, 3, 256, [2816, 2816, 0], 1),  # enough blocks as it is
        (4096, 3, 256, [1024, 0, 0], 4),
        (1000, 3, 256, [1024, 0, 0], 1),  # too few tokens to split
        (16384, 0, 256, [1024, 0, 0], 1),
    ],
)
def test_weight_gradients_are_split_where_few_programs_would_run_long(
    tokens: int, shared: int, width: int, widths: list[int], parts: int
) -> None:
    from mohd_train.kernels.triton.gemm import token_parts

    assert token_parts(tokens, shared, width, widths) == parts
    assert parts == 1 or parts * shared * width * sum(widths) * 4 <= 25 * 2**20  # bytes of partial sums


def test_refused_where_it_cannot_run() -> None:
    from mohd_train.kernels.triton.launch import refusal

    assert "CUDA" in (refusal(torch.device("cpu"), torch.float32, 64, 13) or "")


def test_a_width_that_no_kernel_supports_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mohd_train.kernels.triton.launch import refusal

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    for width in (64, 96, 192, 512):
        assert refusal(cuda, torch.bfloat16, width, 13) is None
    for width in (32, 80, 544):
        assert "64 to 512 in steps of 32" in (refusal(cuda, torch.bfloat16, width, 13) or "")


@pytest.mark.parametrize(("n", "k", "s"), [(16, 4, 3), (16, 12, 9), (4, 2, 2), (32, 4, 2), (32, 16, 3), (24, 8, 4)])
def test_more_choices_than_would_leave_half_of_the_work_padding_are_refused(
    n: int, k: int, s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 16,384 tokens a microbatch; the line names the backend that can run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    part, tokens = SubDimPlan(sub_dims=n, top_k=k, shared=s, width=64), 16384
    padding = part.choices * ops.triton_tile(tokens, k, n, s) // 2
    arguments = ("triton", torch.device("cuda"), torch.bfloat16)
    if padding <= tokens:
        assert ops.resolve_backend(*arguments, width=64, choices=part.choices) == "triton"
    else:
        with pytest.raises(
            UserError, match=f"triton cannot run: a token has {part.choices:,} choices .*use kernels: grouped"
        ):
            ops.resolve_backend(*arguments, width=64, choices=part.choices)


@pytest.mark.parametrize(("module", "name"), KERNELS)
def test_block_sizes_to_choose_among_fit_the_kernel(module: str, name: str) -> None:
    """A tuned kernel has an argument for each of its block sizes, and at least one whose value they are chosen for."""
    kernel = kernel_of(module, name)
    for size in kernel.sizes(128, 90):
        assert set(size.blocks) <= set(kernel.function.arg_names) - set(kernel.keys)
    assert set(kernel.keys) - {"BM"}
