"""What is timed: one step of a model, or of one of its blocks, as a function to call repeatedly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from mohd_train import resources
from mohd_train.config.load import load_model_plan
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.kernels import ops
from mohd_train.model.count import count
from mohd_train.model.llama import Attention, Block, Transformer, rotary_table
from mohd_train.model.mohd import ForwardContext, Routing

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Workload:
    """What a step does, and where.

    Attributes:
        mode: train (loss and gradients of the whole model), forward (its loss), layer (output and gradients of one block), decode
            (one more token on a cache), projections (only the products of decode's blocks, with given choices).
        tokens: tokens in a step; for decode the length of the cache.
        seq_len: tokens in a sequence.
        batch: sequences decoded at once.
        layers: how many layers the models are cut to.
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


def read_plan(name: str, workload: Workload, overrides: list[str] | None = None) -> ModelPlan:
    """The plan of `355m:x2`: configs/model/355m.yaml with configs/mohd/x2.yaml; `355m:moe-x2` is of configs/moe.

    Raises:
        UserError: the name has another form, or a file is missing.
    """
    configs = resources.path("configs")
    model, _, mohd = name.partition(":")
    kind = "moe" if mohd.startswith("moe-") else "mohd"
    files = [configs / "model" / f"{model}.yaml", configs / kind / f"{mohd}.yaml"]
    for file in files:
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise UserError(f"--models {name}: no {file}; {file.parent.name} is one of {known} (as in 355m:x2)")
    more = [f"max_seq_len={max(workload.seq_len, workload.tokens) + 4096}", *(overrides or [])]
    if workload.layers:
        more.append(f"model.num_hidden_layers={workload.layers}")
    return load_model_plan([str(file) for file in files], more)


def flops(plan: ModelPlan, workload: Workload) -> float:
    """FLOPs of one step by `count`, with a backward pass as two forward passes. In mode layer, those of one block."""
    counts = count(plan, workload.seq_len)
    per_token = float(counts.flops_per_token)
    if workload.mode == "layer":
        per_token = (per_token - 2 * counts.head) / plan.num_hidden_layers
    if workload.mode == "projections":
        return (per_token - 2 * counts.head) * workload.batch
    if workload.mode == "decode":
        return per_token * workload.batch
    return per_token * workload.tokens * (3 if workload.mode in ("train", "layer") else 1)


def build(plan: ModelPlan, workload: Workload) -> tuple[Step, nn.Module, Callable[..., Step]]:
    """(the step to time, the module it runs, a function that makes the same step, eager, of another such module)."""
    torch.manual_seed(0)
    with torch.device(workload.device):
        model = Transformer(plan, workload.kernels, seed=0)
    module: nn.Module = model
    if workload.mode == "layer":
        block = model.blocks[0]
        assert isinstance(block, Block)
        module = block
    if workload.mode in ("decode", "projections"):
        model.to(workload.dtype).lay_out_for_decoding()  # as `generate` does
    make = {"layer": _layer, "decode": _decode, "projections": _projections}.get(workload.mode, _whole)

    def step_of(other: nn.Module, compiled: bool = False, mode: str = workload.mode) -> Step:
        return make(other, plan, replace(workload, mode=mode), compiled)

    return step_of(module, workload.compile and workload.mode not in ("decode", "projections")), module, step_of


def autocast(workload: Workload) -> torch.autocast:
    """The workload's reduced precision, if it has one."""
    return torch.autocast(workload.device.type, workload.dtype, enabled=workload.dtype != torch.float32)


def random_values(shape: tuple[int, ...], workload: Workload) -> Tensor:
    """Standard normal, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(workload.device)


def random_ids(shape: tuple[int, int], plan: ModelPlan, workload: Workload) -> Tensor:
    """Tokens, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, plan.vocab_size, shape, generator=generator).to(workload.device)


def _layer(block: nn.Module, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    shape = (workload.tokens // workload.seq_len, workload.seq_len, plan.hidden_size)
    x, slope = random_values(shape, workload).requires_grad_(), random_values(shape, workload)
    positions = torch.arange(workload.seq_len, device=workload.device)[None]
    context = ForwardContext(rotary_table(positions, plan.head_dim, plan.rope_theta, x.dtype))
    run = torch.compile(block, fullgraph=True, dynamic=False) if compiled else block
    wanted = [x, *block.parameters()]

    def step() -> list[Tensor]:
        with autocast(workload):
            out, routing = run(x, context)
        balance = [part.balance_loss for part in (routing.attention, routing.ffn) if part is not None]
        ends, slopes = [out, *balance], [slope, *map(torch.ones_like, balance)]
        return [out.detach(), *torch.autograd.grad(ends, wanted, slopes, allow_unused=True, materialize_grads=True)]

    return step


def _whole(model: nn.Module, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    ids = random_ids((workload.tokens // workload.seq_len, workload.seq_len), plan, workload)
    run = torch.compile(model, dynamic=False) if compiled else model
    wanted = list(model.parameters())

    def train() -> list[Tensor]:
        with autocast(workload):
            out = run(ids, labels_BT=ids, logits=False)
        loss = out.cross_entropy + out.balance_loss
        return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        with autocast(workload):
            return [run(ids, labels_BT=ids, logits=False).cross_entropy]

    return train if workload.mode == "train" else forward


def _decode(model: nn.Module, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    """One new token for each sequence. The cache is cut back to `tokens` positions after the step."""
    ids = random_ids((workload.batch, workload.tokens + 1), plan, workload)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], cache=cache, logits=False)

    @torch.no_grad()
    def step() -> list[Tensor]:
        logits = model(ids[:, -1:], cache=cache).logits
        cache.crop(workload.tokens)
        return [logits]

    return step


def _projections(model: nn.Module, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    """The products of decode's blocks and nothing else: q, k, v, o, gate, up and down for one token a sequence."""
    x_TD = random_values((workload.batch, plan.hidden_size), workload).to(workload.dtype)
    h_TA = random_values((workload.batch, plan.query_width), workload).to(workload.dtype)
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
