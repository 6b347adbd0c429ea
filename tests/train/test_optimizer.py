"""Parameter groups and schedules."""

from __future__ import annotations

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU
from composer.optim import DecoupledAdamW
from composer.optim.scheduler import compile_composer_scheduler
from train.test_composer_model import make

from mohd_train.config.schema import OptimizerConfig, SchedulerConfig
from mohd_train.errors import UserError
from mohd_train.train.optimizer import build_optimizer, build_scheduler, parameter_groups


def names_of(groups: list[dict], model: torch.nn.Module) -> list[set[str]]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{by_id[id(parameter)] for parameter in group["params"]} for group in groups]


def test_every_parameter_is_in_one_group() -> None:
    model = make()
    groups = parameter_groups(model, OptimizerConfig(lr=1e-3, router_lr=1e-4, weight_decay=0.1))
    decay, no_decay, router = names_of(groups, model)
    assert sorted([*decay, *no_decay, *router]) == sorted(name for name, _ in model.named_parameters())
    assert all(name.endswith("router.centroids") for name in router)
    assert len(router) == 4
    assert "model.head.weight" in decay
    assert all(name.endswith(("_proj.weight", "head.weight")) for name in decay)
    assert "model.embedding.weight" in no_decay
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-4]


def test_dense_model_has_no_router_group() -> None:
    assert len(parameter_groups(make(None), OptimizerConfig())) == 2


@pytest.mark.parametrize(("name", "kind"), [("decoupled_adamw", DecoupledAdamW), ("adamw", torch.optim.AdamW)])
def test_optimizers(name: str, kind: type) -> None:
    optimizer = build_optimizer(make(), OptimizerConfig(name=name, betas=[0.8, 0.9]))
    assert type(optimizer) is kind
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def learning_rates(config: SchedulerConfig, duration: str, steps: list[int]) -> list[list[float]]:
    """Learning rates of every group at the given batches, by Composer's own machinery."""
    model = make()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, router_lr=0.5))
    state = State(
        rank_zero_seed=0, run_name="t", model=model, device=DeviceCPU(), optimizers=optimizer, max_duration=duration
    )
    scheduler = compile_composer_scheduler(build_scheduler(config, duration), state)
    found = []
    for batch in range(max(steps) + 1):
        if batch in steps:
            found.append([group["lr"] for group in optimizer.param_groups])
        state.timestamp = state.timestamp.to_next_batch(8, 128)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", ["4ba", "0.2dur"])
def test_cosine_warms_up_and_scales_every_group(warmup: str) -> None:
    rates = learning_rates(SchedulerConfig(t_warmup=warmup, alpha_f=0.1), "20ba", [0, 2, 4, 12, 20])
    router = [rate[2] for rate in rates]
    assert [rate[0] for rate in rates] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])
    assert router == pytest.approx([rate[0] / 2 for rate in rates])


def test_constant_and_linear() -> None:
    assert learning_rates(SchedulerConfig("constant_with_warmup", "2ba"), "10ba", [1, 2, 10])[-1][0] == 1.0
    linear = learning_rates(SchedulerConfig("linear_decay_with_warmup", "0ba", 0.2), "10ba", [0, 5, 10])
    assert [rate[0] for rate in linear] == pytest.approx([1.0, 0.6, 0.2])


def test_warmup_in_another_unit_is_refused() -> None:
    with pytest.raises(UserError, match=r"t_warmup is '100ba'.*max_duration is '1000000tok'.*share of the run"):
        build_scheduler(SchedulerConfig(t_warmup="100ba"), "1000000tok")
    build_scheduler(SchedulerConfig(t_warmup="100ba"), "3ep")  # Composer counts epochs in batches
    build_scheduler(SchedulerConfig(t_warmup="1000tok"), "1000000tok")
