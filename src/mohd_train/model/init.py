"""Initial weights. The paper doesn't specify them, and they decide the sign of its largest effect: a reading
(docs/mohd.md).

``model.init: normal`` draws every matrix from N(0, initializer_range^2); ``torch`` leaves torch's defaults, as
LLM-Shearing, the paper's codebase, does: Linear from U(+-1/sqrt(fan_in)), Embedding from N(0, 1).
``mohd.router_init_std`` sets the std of the router's logits on normalized inputs, the same at every width; by default a
router is drawn like any other Linear. Norms start as ones, group fusion as the identity, so that a fully active,
unscaled layer equals the dense one.

Each parameter draws from a CPU generator of its own, seeded by the run's seed and the parameter's name. So its numbers
depend neither on the order of construction, nor on the device or rank that holds it, nor on which other parameters a
model has: the parts that two models of one seed and one shape share start equal ("the same seed for every model").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mohd_train.config.plan import ModelPlan
from mohd_train.model.mohd import GroupFusion, Router


def initialize(model: nn.Module, plan: ModelPlan, seed: int | None = None) -> None:
    """Fills every parameter of ``model`` in place. Without a seed, one is drawn from torch's global generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    model.apply(initializer(model, plan, seed))


def initializer(model: nn.Module, plan: ModelPlan, seed: int) -> Callable[[nn.Module], None]:
    """A function that fills the parameters that one module of ``model`` holds directly, on whatever device they are by then.

    For models built on the meta device: FSDP calls it (as ``param_init_fn``) for each module it has just given memory,
    so that no process ever holds the whole model.
    """
    names = {module: name for name, module in model.named_modules()}

    def fill(module: nn.Module) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            fill_parameter(module, leaf, parameter, plan, _generator(seed, f"{names[module]}.{leaf}"))

    return fill


@torch.no_grad()
def fill_parameter(
    module: nn.Module, leaf: str, parameter: Tensor, plan: ModelPlan, generator: torch.Generator | None = None
) -> None:
    """Draws one parameter of ``module`` in place, on the CPU: a value is the same on every device."""
    on_cpu = parameter.device.type == "cpu"
    value = parameter if on_cpu else torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    if isinstance(module, GroupFusion):
        _identity(value, leaf)
    elif value.dim() == 1:
        value.fill_(1)
    elif isinstance(module, Router) and plan.router_init_std is not None:
        value.normal_(0, plan.router_init_std / value.shape[1] ** 0.5, generator=generator)
    elif plan.init == "normal":
        value.normal_(0, plan.initializer_range, generator=generator)
    elif isinstance(module, nn.Embedding):
        value.normal_(0, 1, generator=generator)
    else:
        bound = value.shape[1] ** -0.5
        value.uniform_(-bound, bound, generator=generator)
    if not on_cpu:
        parameter.copy_(value)


def _identity(value: Tensor, leaf: str) -> None:
    """``mixing`` [N (from), N (to), C] or ``within`` [N, C, C]."""
    eye = torch.eye(value.shape[1], device=value.device)
    value.copy_((eye[:, :, None] if leaf == "mixing" else eye).expand_as(value))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu")
    generator.manual_seed(int.from_bytes(digest[:7], "little"))
    return generator
