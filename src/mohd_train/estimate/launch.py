"""What a run will take (memory, time, disk, data), from a config and the name of a GPU alone."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit

from mohd_train.config.plan import ModelPlan, make_plan
from mohd_train.config.schema import Config
from mohd_train.data.manifest import MANIFEST, Manifest, load_manifest
from mohd_train.data.mix import MixPlan, epoch_samples, plan_mix
from mohd_train.errors import UserError
from mohd_train.estimate.activations import trace
from mohd_train.estimate.hardware import CONTEXT, FRAGMENTATION, GPU, default_mfu
from mohd_train.estimate.memory import OPTIMIZER_STATES, WIDE, MemoryModel, sharding
from mohd_train.model.count import Counts, count
from mohd_train.train.composer_model import FORWARD_PASSES_PER_STEP
from mohd_train.train.data import total_steps
from mohd_train.train.parallel import FSDP_DEFAULTS


@dataclass(frozen=True)
class Estimate:
    """One run on ``gpus`` GPUs, in bytes, seconds and FLOPs. ``--json`` prints every field.

    Attributes:
        stage, parts: the stage at which memory peaks, and what it holds then; ``needed`` adds context and fragmentation.
        microbatch: samples; the config's, or where it says ``auto`` the largest that fits (0: none does).
        largest_microbatch: the largest that fits; 0: none does.
        checkpoints: how many the run writes; ``disk`` is the size of those it keeps and of one more being written.
        free_disk: free on the file system of the run folder; None for a remote one.
        tokens_needed, tokens_available: by domain; available is None where no data is prepared yet.
        notes: what is left out or wrong.
    """

    run_name: str
    gpu: str
    gpus: int
    parameters: int
    activated: int
    steps: int
    tokens_per_step: int
    flops_per_step: int
    microbatch: int
    largest_microbatch: int
    device_batch: int
    stage: str
    parts: dict[str, int]
    needed: int
    memory: int
    mfu: float
    mfu_source: str
    step_seconds: float
    tokens_per_second: float
    days: float
    checkpoint: int
    checkpoints: int
    disk: int
    free_disk: int | None
    tokens_needed: dict[str, int]
    tokens_available: dict[str, int | None]
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the config's microbatch fits."""
        return 0 < self.microbatch <= self.largest_microbatch

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "fits": self.fits}


def prepared(config: Config) -> Manifest | None:
    """The manifest of the config's data; None if the data is not prepared, or not on this machine. Raises UserError if broken."""
    folder = Path(config.data.local)
    return load_manifest(folder) if (folder / MANIFEST).is_file() else None


def run_steps(config: Config, manifest: Manifest | None) -> int:
    """Batches in the whole run. Raises UserError if its length is in epochs and there is no data to tell an epoch's length."""
    per_epoch = 0
    if manifest is not None:
        per_epoch = (
            epoch_samples(config.data, manifest, config.global_train_batch_size) // config.global_train_batch_size
        )
    elif Time.from_timestring(config.max_duration).unit == TimeUnit.EPOCH:
        raise UserError(
            f"max_duration is {config.max_duration}, and an epoch's length depends on the data, but {config.data.local} has none; "
            "prepare the data, or give max_duration in ba, sp or tok"
        )
    return total_steps(
        config.max_duration,
        batch_size=config.global_train_batch_size,
        seq_len=config.max_seq_len,
        steps_per_epoch=per_epoch,
    )


def checkpoints(config: Config, steps: int, manifest: Manifest | None) -> tuple[int, int]:
    """How many checkpoints a run writes, one every ``save_interval`` and one at its end, and how many are on disk at most: the last
    K, those of ``save_keep_every``, and one more being written."""
    interval = Time.from_timestring(config.save_interval)
    if interval.unit == TimeUnit.DURATION:
        every = max(1, int(steps * interval.value))
    elif interval.unit == TimeUnit.EPOCH and manifest is None:
        every = steps
    else:
        every = run_steps(dataclasses.replace(config, max_duration=config.save_interval), manifest)
    written, keep = math.ceil(steps / every), config.save_num_checkpoints_to_keep
    if keep < 0:
        return written, written
    permanent = 0
    if config.save_keep_every is not None:
        permanent = steps // math.lcm(every, int(Time.from_timestring(config.save_keep_every).value))
    return written, min(written, keep + 1 + permanent)


def checkpoint_bytes(counts: Counts) -> int:
    """Weights and both of Adam's moments in float32, in one file or in shards."""
    return (1 + OPTIMIZER_STATES) * WIDE * counts.parameters


def _free(folder: str) -> int | None:
    """Bytes free where ``folder`` is or will be created; None if it is remote."""
    if "://" in folder:
        return None
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def _tokens(config: Config, manifest: Manifest | None, samples: int) -> tuple[dict[str, int], dict[str, int | None]]:
    """Tokens needed and available, by domain."""
    if manifest is not None:
        mix: MixPlan = plan_mix(config.data, manifest, samples)
        return (
            {part.name: part.tokens for part in mix.plans},
            {part.name: part.available * manifest.seq_len for part in mix.plans},
        )
    whole = sum(config.data.domains.values())
    needed = {name: round(samples * share / whole) * config.max_seq_len for name, share in config.data.domains.items()}
    return needed, dict.fromkeys(needed)


def _notes(config: Config, manifest: Manifest | None, fsdp: dict[str, Any] | None) -> list[str]:
    notes = []
    if manifest is None:
        where = "is remote" if config.data.remote else f"is not at {config.data.local}"
        notes.append(f"data: the prepared data {where}, so the available tokens are unknown")
    else:
        absent = [name for name in config.data.domains if name not in manifest.domains]
        if absent:
            notes.append(f"data: the prepared data lacks {', '.join(absent)}; the other shares are renormalized")
        if manifest.seq_len != config.max_seq_len:
            notes.append(
                f"data: samples have {manifest.seq_len} tokens, but max_seq_len is {config.max_seq_len}: training will refuse it"
            )
    if config.compile:
        notes.append("memory: estimated without torch.compile, which usually takes less")
    for key, known in (("mixed_precision", "FULL"), ("cpu_offload", False), ("activation_cpu_offload", False)):
        if fsdp is not None and fsdp.get(key, known) != known:
            notes.append(f"memory: estimated for fsdp_config.{key}={known}, not {fsdp[key]}")
    return notes


def _device_batch(config: Config, gpus: int) -> int:
    size = config.global_train_batch_size
    if size % gpus:
        raise UserError(
            f"global_train_batch_size is {size}, which does not divide over {gpus} GPUs; give another --gpus"
        )
    return size // gpus


def memory_model(config: Config, plan: ModelPlan, gpus: int) -> MemoryModel:
    """The memory of one of ``gpus`` GPUs. Runs the model's code on fake tensors, which takes seconds."""
    return MemoryModel(
        plan=plan,
        counts=count(plan),
        saved=trace(plan, config.precision, config.kernels),
        sharding=sharding(_fsdp(config), gpus),
        precision=config.precision,
        optimizer=config.optimizer.name,
        device_batch=_device_batch(config, gpus),
        eval_batch=config.device_eval_batch_size,
    )


def _fsdp(config: Config) -> dict[str, Any] | None:
    return None if config.fsdp_config is None else FSDP_DEFAULTS | dict(config.fsdp_config)


def estimate(config: Config, gpu: GPU, gpus: int, mfu: float | None = None) -> Estimate:
    """What ``config`` takes on ``gpus`` GPUs.

    Args:
        config: the run.
        gpu: the kind of GPU.
        gpus: GPUs over all nodes (8 a node).
        mfu: model FLOPs utilization; None: :func:`mohd_train.estimate.hardware.default_mfu`.

    Raises:
        UserError: the batch does not divide, the run's length is unknown, the manifest is broken, or a domain is missing.
    """
    plan, manifest = make_plan(config.model, config.mohd, config.max_seq_len), prepared(config)
    memory, steps = memory_model(config, plan, gpus), run_steps(config, manifest)
    largest, device_batch = memory.largest(gpu.memory), memory.device_batch
    asked = config.device_train_microbatch_size
    microbatch = largest if asked == "auto" else min(int(asked), device_batch)
    stage, parts = memory.peak(max(microbatch, 1))
    tokens_per_step = config.global_train_batch_size * config.max_seq_len
    flops = FORWARD_PASSES_PER_STEP * memory.counts.flops_per_token * tokens_per_step
    source = "given"
    if mfu is None:
        mfu, source = default_mfu(gpu, plan, memory.sharding.checkpointing)
    seconds = flops / (gpus * gpu.peak(config.precision) * mfu)
    size, (written, held) = checkpoint_bytes(memory.counts), checkpoints(config, steps, manifest)
    needed, available = _tokens(config, manifest, steps * config.global_train_batch_size)
    return Estimate(
        run_name=str(config.run_name), gpu=gpu.name, gpus=gpus,
        parameters=memory.counts.parameters, activated=memory.counts.activated,
        steps=steps, tokens_per_step=tokens_per_step, flops_per_step=flops,
        microbatch=microbatch, largest_microbatch=largest, device_batch=device_batch,
        stage=stage, parts=parts, needed=memory.needed(max(microbatch, 1)), memory=gpu.memory,
        mfu=mfu, mfu_source=source, step_seconds=seconds, tokens_per_second=tokens_per_step / seconds,
        days=steps * seconds / 86400,
        checkpoint=size, checkpoints=written, disk=size * held,
        free_disk=_free(config.save_folder), tokens_needed=needed, tokens_available=available,
        notes=_notes(config, manifest, _fsdp(config)),
    )  # fmt: skip


MEMORY_BESIDE = f"{FRAGMENTATION:.0%} for fragmentation and {CONTEXT / 2**30:.0f} GiB for CUDA, cuBLAS and NCCL"
