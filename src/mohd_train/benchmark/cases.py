"""What is measured: one step of a model (or of one of its blocks), as a function that can be called again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from mohd_train.config.load import load_model_plan
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.kernels import ops
from mohd_train.model.count import count
from mohd_train.model.llama import Attention, Block, Transformer, rotary_table
from mohd_train.model.mohd import ForwardContext, Routing

MODES = ("train", "forward", "decode", "projections", "layer")
Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        mode: train (loss and gradients of the whole model), forward, decode (one more token on a cache), layer (one block,
            output and gradients), projections (decode's products of the blocks alone, the choices given).
        tokens: tokens of a step; for decode the context that the cache holds.
        seq_len: tokens of a sequence.
        batch: sequences decoded at once.
    """

    mode: str
    device: torch.device
    dtype: torch.dtype
    tokens: int
    seq_len: int
    batch: int = 1
    kernels: str = "auto"
    compile: bool = True
    layers: int | None = None


def read_plan(name: str, configs: Path, settings: Settings, overrides: list[str] | None = None) -> ModelPlan:
    """The plan of `355m:x2`: configs/model/355m.yaml with configs/mohd/x2.yaml.

    Raises:
        UserError: not of that form, or no such file.
    """
    model, _, mohd = name.partition(":")
    files = [configs / "model" / f"{model}.yaml", configs / "mohd" / f"{mohd}.yaml"]
    for file in files:
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise UserError(f"--models {name}: no {file}; {file.parent.name} is one of {known} (as in 355m:x2)")
    more = [f"max_seq_len={max(settings.seq_len, settings.tokens) + 4096}", *(overrides or [])]
    if settings.layers:
        more.append(f"model.num_hidden_layers={settings.layers}")
    return load_model_plan([str(file) for file in files], more)


def flops(plan: ModelPlan, settings: Settings) -> float:
    """Arithmetic of one step by `count`: a backward pass is twice the forward; of one block in mode layer."""
    counts = count(plan, settings.seq_len)
    per_token = float(counts.flops_per_token)
    if settings.mode == "layer":
        per_token = (per_token - 2 * counts.head) / plan.num_hidden_layers
    if settings.mode == "projections":
        return (per_token - 2 * counts.head) * settings.batch
    if settings.mode == "decode":
        return per_token * settings.batch
    return per_token * settings.tokens * (3 if settings.mode in ("train", "layer") else 1)


def build(plan: ModelPlan, settings: Settings) -> tuple[Step, nn.Module, Callable[[nn.Module], Step]]:
    """(the step to time, the module it runs, a function that gives the same step, eager, of another such module)."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = Transformer(plan, settings.kernels, seed=0)
    module: nn.Module = model
    if settings.mode == "layer":
        block = model.blocks[0]
        assert isinstance(block, Block)
        module = block
    if settings.mode in ("decode", "projections"):
        model.to(settings.dtype).lay_out_for_decoding()  # as `generate` does
    make = {"layer": _layer, "decode": _decode, "projections": _projections}.get(settings.mode, _whole)

    def step_of(other: nn.Module, compiled: bool = False) -> Step:
        return make(other, plan, settings, compiled)

    return step_of(module, settings.compile and settings.mode not in ("decode", "projections")), module, step_of


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast(settings.device.type, settings.dtype, enabled=settings.dtype != torch.float32)


def _random(shape: tuple[int, ...], settings: Settings) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(settings.device)


def _ids(shape: tuple[int, int], plan: ModelPlan, settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, plan.vocab_size, shape, generator=generator).to(settings.device)


def _layer(block: nn.Module, plan: ModelPlan, settings: Settings, compiled: bool) -> Step:
    shape = (settings.tokens // settings.seq_len, settings.seq_len, plan.hidden_size)
    x, slope = _random(shape, settings).requires_grad_(), _random(shape, settings)
    positions = torch.arange(settings.seq_len, device=settings.device)[None]
    context = ForwardContext(rotary_table(positions, plan.head_dim, plan.rope_theta, x.dtype))
    run = torch.compile(block, fullgraph=True, dynamic=False) if compiled else block
    wanted = [x, *block.parameters()]

    def step() -> list[Tensor]:
        with _autocast(settings):
            out, routing = run(x, context)
        balance = [part.balance_loss for part in (routing.attention, routing.ffn) if part is not None]
        ends, slopes = [out, *balance], [slope, *map(torch.ones_like, balance)]
        return [out.detach(), *torch.autograd.grad(ends, wanted, slopes, allow_unused=True, materialize_grads=True)]

    return step


def _whole(model: nn.Module, plan: ModelPlan, settings: Settings, compiled: bool) -> Step:
    ids = _ids((settings.tokens // settings.seq_len, settings.seq_len), plan, settings)
    run = torch.compile(model, dynamic=False) if compiled else model
    wanted = list(model.parameters())

    def train() -> list[Tensor]:
        with _autocast(settings):
            out = run(ids, labels_BT=ids, logits=False)
        loss = out.cross_entropy + out.balance_loss
        return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        with _autocast(settings):
            return [run(ids, labels_BT=ids, logits=False).cross_entropy]

    return train if settings.mode == "train" else forward


def _decode(model: nn.Module, plan: ModelPlan, settings: Settings, compiled: bool) -> Step:
    """One token for each sequence on a cache of `tokens` positions, which is cut back to that length after the step."""
    ids = _ids((settings.batch, settings.tokens + 1), plan, settings)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], cache=cache, logits=False)

    @torch.no_grad()
    def step() -> list[Tensor]:
        logits = model(ids[:, -1:], cache=cache).logits
        cache.crop(settings.tokens)
        return [logits]

    return step


def _projections(model: nn.Module, plan: ModelPlan, settings: Settings, compiled: bool) -> Step:
    """What decode multiplies by in its blocks, and nothing else: q, k, v, o, gate, up and down of one token a sequence."""
    x_TD = _random((settings.batch, plan.hidden_size), settings).to(settings.dtype)
    h_TA = _random((settings.batch, plan.query_width), settings).to(settings.dtype)
    parts = [part for block in model.blocks for part in (block.attention, block.ffn)]  # type: ignore[union-attr]
    with torch.no_grad():
        routed = [part.sub_dimensions and part.sub_dimensions.route(x_TD) for part in parts]

    @torch.no_grad()
    def step() -> list[Tensor]:
        return [_products(part, chosen, x_TD, h_TA) for part, chosen in zip(parts, routed, strict=True)]

    return step


def _products(part: Any, routed: tuple[Routing, ops.Selection] | None, x_TD: Tensor, h_TA: Tensor) -> Tensor:
    inputs = part.up_projections
    if routed is None:
        outs = [linear(x_TD) for linear in inputs]
        if isinstance(part, Attention):
            return torch.cat([*outs, part.o_proj(h_TA)], 1)
        return part.down_proj(F.silu(outs[0]) * outs[1])
    (routing, selection), weights = routed, [linear.weight for linear in inputs]
    backend = part.sub_dimensions.backend(x_TD)
    if not isinstance(part, Attention):
        down = part.down_proj.weight
        return ops.swiglu_ffn(x_TD, weights[0], weights[1], down, selection, routing.weights, backend=backend)
    qkv = ops.up_projection(x_TD, weights, selection, backend=backend)
    out = ops.down_projection(h_TA, part.o_proj.weight, selection, routing.weights, backend=backend)
    return torch.cat([*qkv, out], 1)
