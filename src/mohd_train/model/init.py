"""Initial weights: normal with the initializer range for every matrix, ones for norms, the identity for group fusion.

Each parameter draws from a generator seeded by the run's seed and the parameter's name, so that it does not depend on the order
of construction, on the rank that holds it, or on which other parameters a model has: the shared parts of two models of one
seed and one shape start equal ("the same seed for every model").
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from mohd_train.config.plan import ModelPlan
from mohd_train.model.group_fusion import GroupFusion


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:7], "little"))
    return generator


@torch.no_grad()
def initialize(model: nn.Module, plan: ModelPlan, seed: int | None = None) -> None:
    """Fills every parameter of ``model`` in place. Without a seed, one is drawn from torch's global generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    for name, module in model.named_modules():
        if isinstance(module, GroupFusion):
            module.reset_parameters()
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}"
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(
                    parameter, std=plan.initializer_range, generator=_generator(seed, full, parameter.device)
                )
