"""Device, precision, batch sizes and sharding: how a model is spread over the available devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.utils.parallelism import FSDPConfig
from torch.distributed.checkpoint import DefaultLoadPlanner

from mohd_train.checkpoint import kind_of
from mohd_train.config.bounds import BOUNDS
from mohd_train.config.plan import ModelPlan
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.kernels import ops
from mohd_train.kernels.loss import loss_name
from mohd_train.model.llama import Transformer
from mohd_train.utils.text import nearest

# mixed_precision FULL gathers float32 parameters and leaves bfloat16 to autocast, as under DDP: with DEFAULT the
# router's centroids and its input would be rounded to bfloat16, where 0.4% of the choices flip. Reentrant recomputation
# would drop the gradient of what isn't a plain tensor output, such as a block's balance loss. A full state dict is one
# file, for DDP too.
FSDP_DEFAULTS: dict[str, Any] = {
    "mixed_precision": "FULL",
    "activation_checkpointing_reentrant": False,
    "state_dict_type": "full",
}
SHARDED_NAME = "ep{epoch}-ba{batch}"  # Composer's


def world_size() -> int:
    """Processes of this launch (the composer launcher sets WORLD_SIZE); 1 under plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this process speaks for the run."""
    return int(os.environ.get("RANK", "0")) == 0


def resolve_device(name: str) -> str:
    """``cpu`` or ``gpu`` for ``auto`` | ``cpu`` | ``gpu``. Raises UserError for a GPU that is not there."""
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "device is gpu, but torch sees none; set device=cpu, or install a torch build for your GPU's driver"
        )
    return ("gpu" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_precision(precision: str, device: str) -> None:
    """Composer trains on a CPU in fp32 only, and amp_bf16 needs a GPU that supports it."""
    if device == "cpu" and precision != "fp32":
        raise UserError(f"precision is {precision}, which Composer does not train in on a CPU; set precision=fp32")
    if device == "gpu" and precision == "amp_bf16" and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"precision is amp_bf16, which {torch.cuda.get_device_name()} lacks; set precision=amp_fp16 or fp32"
        )


def check_seed(seed: int) -> None:
    """Each process adds its rank to the seed, and the sum must still be a valid seed. Raises UserError otherwise."""
    largest = BOUNDS["seed"].high - world_size() + 1
    if seed > largest:
        raise UserError(f"seed is {seed}; with {world_size()} processes it must be at most {largest:.0f}")


def device_batch_size(config: Config) -> int:
    """Samples a device takes per step. Raises UserError where the global batch does not divide."""
    size, devices = config.global_train_batch_size, world_size()
    if size % devices:
        raise UserError(
            f"global_train_batch_size is {size}, which does not divide over {devices} processes; "
            f"nearest that do: {max(size // devices, 1) * devices}, {(size // devices + 1) * devices}"
        )
    return size // devices


def microbatch_size(config: Config, device: str) -> int | str:
    """Samples per forward pass: ``auto`` lets Composer halve on running out of GPU memory; a CPU takes its whole batch
    at once."""
    whole = device_batch_size(config)
    if config.device_train_microbatch_size == "auto":
        return "auto" if device == "gpu" else whole
    return min(int(config.device_train_microbatch_size), whole)


def parallelism_config(config: Config, device: str) -> dict[str, Any] | None:
    """Composer's ``parallelism_config``; None for DDP or one device.

    Raises:
        UserError: an unknown FSDP key (Composer would accept it silently), a value that breaks training, or no GPU.
    """
    if config.fsdp_config is None:
        return None
    if device != "gpu":
        raise UserError("fsdp_config is set, but Composer shards over GPUs alone; on a CPU set fsdp_config=null (DDP)")
    known = [field.name for field in dataclasses.fields(FSDPConfig) if field.init]
    for key in config.fsdp_config:
        if key not in known:
            raise UserError(f"fsdp_config: unknown key {key!r}{nearest(str(key), known)}")
    merged = FSDP_DEFAULTS | dict(config.fsdp_config)
    _check_mixed_precision(merged["mixed_precision"])
    if merged["activation_checkpointing_reentrant"]:
        raise UserError(
            "fsdp_config.activation_checkpointing_reentrant must be false: it would drop the balance loss's gradient"
        )
    if merged["state_dict_type"] not in ("full", "sharded"):
        raise UserError(f"fsdp_config.state_dict_type is {merged['state_dict_type']!r}; set full or sharded")
    if is_sharded(config):
        if merged.get("sharded_ckpt_prefix_dir", SHARDED_NAME) != SHARDED_NAME:
            raise UserError(f"fsdp_config.sharded_ckpt_prefix_dir must be {SHARDED_NAME}: resuming looks for that name")
        if merged.get("load_planner") is not None or merged.get("save_planner") is not None:
            raise UserError("fsdp_config.load_planner and save_planner are no settings of a file; leave them out")
        # What a session logs or watches may change, and with it what callbacks keep; the rest is checked to be there
        # before.
        merged["load_planner"] = DefaultLoadPlanner(allow_partial_load=True)
    return {"fsdp": merged}


def _check_mixed_precision(value: Any) -> None:
    """Neither the routers' centroids nor their input may be cast: see :data:`FSDP_DEFAULTS`."""
    if isinstance(value, Mapping):
        casts = [key for key in ("param_dtype", "buffer_dtype") if value.get(key) not in (None, "fp32", "float32")]
        if not casts and not value.get("cast_forward_inputs") and not value.get("cast_root_forward_inputs"):
            return
    elif str(value).upper() == "FULL":
        return
    raise UserError(
        f"fsdp_config.mixed_precision is {value!r}; set FULL: it would hand the routers bfloat16, in which 0.4% of their "
        "choices flip (precision: amp_bf16 runs every matrix product in bfloat16 all the same)"
    )


def is_sharded(config: Config) -> bool:
    """Whether checkpoints are folders into which every rank writes its part."""
    return config.fsdp_config is not None and config.fsdp_config.get("state_dict_type") == "sharded"


def check_layout(config: Config, checkpoint: Path) -> None:
    """Raises UserError where Composer would not read ``checkpoint`` as it is, a file or a folder."""
    sharded = kind_of(checkpoint) == "sharded"
    if sharded == is_sharded(config):
        return
    if sharded:
        raise UserError(
            f"{checkpoint} is a sharded checkpoint; set fsdp_config.state_dict_type=sharded, as FSDP alone reads it"
        )
    raise UserError(f"{checkpoint} is one file, and not sharded; set fsdp_config.state_dict_type=full")


COMPUTE_DTYPES = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def resolve_kernels(config: Config, plan: ModelPlan, device: str) -> str:
    """The backends that run the sparse layers, such as ``grouped``; ``dense`` where there are none.

    Raises:
        UserError: one that this device, precision, width or number of choices can't run; the message names the one to use instead.
    """
    where = torch.device("cuda" if device == "gpu" else "cpu")
    dtype = COMPUTE_DTYPES[config.precision]
    chosen = {
        ops.resolve_backend(config.kernels, where, dtype, width=part.width, choices=part.choices)
        for part in plan.routed.values()
    }
    return ", ".join(sorted(chosen)) or "dense"


def resolve_loss(config: Config, device: str) -> str:
    """What computes the loss, such as ``liger 0.8.5`` or ``chunked``.

    Raises:
        UserError: the installed Liger isn't precise enough.
    """
    return loss_name("cuda" if device == "gpu" else "cpu", COMPUTE_DTYPES[config.precision])


def mark_blocks(model: Transformer) -> None:
    """One FSDP unit, and one unit of activation checkpointing, per block: marks that Composer reads."""
    for block in model.blocks:
        block._fsdp_wrap = True
        block._activation_checkpointing = True
