"""GPUs, and what share of their peak a training run reaches."""

from __future__ import annotations

from dataclasses import dataclass

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.utils.text import nearest

GIB = 1 << 30


@dataclass(frozen=True)
class GPU:
    """One GPU: the memory that a process can use, and dense peaks (no structured sparsity) in FLOP/s from NVIDIA's data sheets.

    Attributes:
        memory: bytes as the driver reports them, a little less than the name says.
        half_flops: bfloat16 and float16 on tensor cores.
        tf32_flops: float32 products; Composer lets them run in TF32 (``DeviceGPU(allow_tf32=True)``).
        mfu: the default for a dense model, see :data:`MFU_SOURCE`.
    """

    name: str
    memory: int
    half_flops: float
    tf32_flops: float
    mfu: float

    def peak(self, precision: str) -> float:
        """FLOP/s in the config's ``precision``."""
        return self.tf32_flops if precision == "fp32" else self.half_flops


GPUS = {
    "a100-40gb": GPU("A100 40GB", int(39.4 * GIB), 312e12, 156e12, 0.45),
    "a100-80gb": GPU("A100 80GB", int(79.1 * GIB), 312e12, 156e12, 0.45),
    "h100": GPU("H100 SXM", int(79.1 * GIB), 989e12, 494.5e12, 0.35),
    "h200": GPU("H200 SXM", int(139.8 * GIB), 989e12, 494.5e12, 0.35),
}

# Memory outside torch's allocator: CUDA context, cuBLAS workspaces, NCCL buffers
CONTEXT = 2 * GIB
# What the caching allocator holds but can't use, as a share of what is in use
FRAGMENTATION = 0.05

MFU_SOURCE = (
    "llm-foundry measured 53 to 60% on 8 A100s and 36 to 42% on 8 H100s (MPT 350M to 3B, sequence length 4096, FSDP); "
    "rounded down, as norms, rotation and SwiGLU are not fused here"
)
SPARSE_SHARE = 0.63
SPARSE_SOURCE = "the share of its dense twin's throughput that OLMoE reports, as MoHD has not been timed on a GPU"
RECOMPUTED = 0.75  # 3 passes count, 4 run


def gpu_named(name: str) -> GPU:
    """The GPU of that name. Raises UserError if it is not in :data:`GPUS`."""
    if name not in GPUS:
        raise UserError(f"--gpu {name!r} is unknown{nearest(name, list(GPUS))}; known: {', '.join(GPUS)}")
    return GPUS[name]


def default_mfu(gpu: GPU, plan: ModelPlan, checkpointing: bool) -> tuple[float, str]:
    """The model FLOPs utilization to assume, and where the number comes from."""
    mfu, source = gpu.mfu, MFU_SOURCE
    if plan.routed:
        mfu, source = mfu * SPARSE_SHARE, f"{source}; times {SPARSE_SHARE}, {SPARSE_SOURCE}"
    if checkpointing:
        mfu, source = mfu * RECOMPUTED, f"{source}; times {RECOMPUTED} for activation checkpointing"
    return mfu, source
