"""The run's data as Composer takes it: a checked manifest, the planned mix, a train loader and one evaluator per
domain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from composer.core import DataSpec, Evaluator, Time, TimeUnit

from mohd_train.config.schema import Config
from mohd_train.data.manifest import Manifest, load_manifest
from mohd_train.data.streaming import MixPlan, build_eval_loaders, build_train_loader, check_data, plan_mix
from mohd_train.errors import UserError
from mohd_train.train.parallel import device_batch_size
from mohd_train.utils.distributed import from_first_of_node


def check_on_nodes(config: Config) -> Manifest:
    """Checks the data once per node, which may have its own copy; every process raises what any of them finds.

    Raises:
        UserError: the folder, a domain, the tokenizer, the sequence length or a shard is wrong.
    """
    from_first_of_node(lambda: check_data(config.data, vocab_size=config.model.vocab_size, seq_len=config.max_seq_len))
    return load_manifest(config.data.local)


@dataclass
class TrainData:
    """What a run trains and validates on; ``steps`` is its length in batches."""

    train: DataSpec
    evaluators: list[Evaluator]
    mix: MixPlan
    steps: int
    steps_per_epoch: int


def total_steps(max_duration: str, *, batch_size: int, seq_len: int, steps_per_epoch: int) -> int:
    """Batches until ``max_duration`` is reached; the last batch is a full one, so tokens and samples round up."""
    time = Time.from_timestring(max_duration)
    value = int(time.value)
    if time.unit == TimeUnit.EPOCH:
        return value * steps_per_epoch
    per_step = {TimeUnit.BATCH: 1, TimeUnit.SAMPLE: batch_size, TimeUnit.TOKEN: batch_size * seq_len}[time.unit]
    return math.ceil(value / per_step)


def _check_warmup(config: Config, seq_len: int, steps: int, steps_per_epoch: int) -> None:
    """The part of config/check.py's rule that needs the data: how many batches an epoch has."""
    warmup = config.scheduler.t_warmup
    if warmup.endswith("dur"):
        return
    size = config.global_train_batch_size
    length = total_steps(warmup, batch_size=size, seq_len=seq_len, steps_per_epoch=steps_per_epoch)
    if length > steps:
        raise UserError(
            f"scheduler.t_warmup is {warmup!r}, {length} batches, and the run has {steps} (max_duration is "
            f'{config.max_duration!r}); give a shorter one, or a share of the run such as "0.03dur"'
        )


def build_data(config: Config, manifest: Manifest) -> TrainData:
    """Loaders of this rank, and the mix that the whole run will see."""
    loader = build_train_loader(
        config.data,
        manifest,
        global_batch_size=config.global_train_batch_size,
        device_batch_size=device_batch_size(config),
        seed=config.seed,
    )
    steps_per_epoch = len(loader)
    steps = total_steps(
        config.max_duration,
        batch_size=config.global_train_batch_size,
        seq_len=manifest.seq_len,
        steps_per_epoch=steps_per_epoch,
    )
    _check_warmup(config, manifest.seq_len, steps, steps_per_epoch)
    mix = plan_mix(config.data, manifest, steps * config.global_train_batch_size)
    loaders = build_eval_loaders(config.data, manifest, device_batch_size=config.device_eval_batch_size)
    evaluators = [Evaluator(label=domain, dataloader=DataSpec(part)) for domain, part in loaders.items()]
    return TrainData(DataSpec(loader), evaluators, mix, steps, steps_per_epoch)
