"""The models that a user would use instead, as transformers has them: timed in turn with ours, at equal sizes.

``355m:hf-llama`` is ``LlamaForCausalLM`` (or one ``LlamaDecoderLayer``) of the base model's size, with its weights: its output is
compared with our dense model's before it is timed. ``355m:hf-mixtral-x2`` is a Mixtral as large as ``355m:moe-x2``: the same number
of experts, of the same width, and as many a token (Mixtral has no shared experts, so a router chooses all of them).

A Llama is compiled where ours is. Mixtral's loop over its experts has shapes that depend on the data, on which torch.compile
breaks the graph, so it runs as its users run it: eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from mohd_train.benchmark.cases import Step, Workload, autocast, random_ids, random_values, read_plan
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.hf.convert import LLAMA_NAMES, llama_sizes, renamed_weights
from mohd_train.model.llama import Transformer

LLAMA, MIXTRAL = "hf-llama", "hf-mixtral-"
MODES = ("layer", "train", "decode")


def is_peer(name: str) -> bool:
    """Whether ``355m:...`` is one of transformers' models."""
    return name.partition(":")[2].startswith((LLAMA, MIXTRAL))


def plan_of(name: str, workload: Workload) -> ModelPlan:
    """The plan of ours that is as large.

    Raises:
        UserError: an unknown peer, or a mode that peers don't have.
    """
    base, _, peer = name.partition(":")
    if workload.mode not in MODES:
        raise UserError(f"--models {name}: transformers' models have the modes {', '.join(MODES)}")
    if peer == LLAMA:
        return read_plan(f"{base}:dense", workload)
    if not peer.startswith(MIXTRAL):
        raise UserError(f"--models {name}: give {LLAMA} or {MIXTRAL}x2, ...")
    return read_plan(f"{base}:moe-{peer.removeprefix(MIXTRAL)}", workload)


def build(plan: ModelPlan, workload: Workload) -> tuple[Step, nn.Module]:
    """The step to time, and the module that it runs."""
    sizes = {**llama_sizes(plan), "attn_implementation": "sdpa", "use_cache": False}
    torch.manual_seed(0)
    config: Any
    if plan.experts is None:
        config = LlamaConfig(**sizes)
    else:
        numbers = {"num_local_experts": plan.experts.sub_dims, "num_experts_per_tok": plan.experts.top_k}
        config = MixtralConfig(**sizes | numbers | {"intermediate_size": plan.experts.width, "sliding_window": None})
    make: Callable[..., Step] = {"layer": _layer, "train": _train, "decode": _decode}[workload.mode]
    with torch.device(workload.device):
        module: Any
        if workload.mode == "layer":
            module = LlamaDecoderLayer(config, 0) if plan.experts is None else MixtralDecoderLayer(config, 0)
        else:
            module = LlamaForCausalLM(config) if plan.experts is None else MixtralForCausalLM(config)
        if plan.experts is None:
            _as_ours(module, plan, workload)
    if workload.mode == "decode":
        module.to(workload.dtype).eval()
    compiled = workload.compile and plan.experts is None and workload.mode != "decode"
    return make(module, config, plan, workload, compiled), module


def _as_ours(module: nn.Module, plan: ModelPlan, workload: Workload) -> None:
    """Gives a Llama, or its one layer, the weights of our dense model."""
    named = renamed_weights(Transformer(plan, seed=0).to(workload.device).state_dict(), LLAMA_NAMES)
    if workload.mode == "layer":
        prefix = "model.layers.0."
        named = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    module.load_state_dict(named)


def _layer(layer: nn.Module, config: Any, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    shape = (workload.tokens // workload.seq_len, workload.seq_len, plan.hidden_size)
    x, slope = random_values(shape, workload).requires_grad_(), random_values(shape, workload)
    positions = torch.arange(workload.seq_len, device=workload.device)[None]
    table = LlamaRotaryEmbedding(config).to(workload.device)(x, positions)
    run: Any = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
    wanted = [x, *layer.parameters()]

    def step() -> list[Tensor]:
        with autocast(workload):
            out = run(x, position_embeddings=table, attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, wanted, slope, allow_unused=True, materialize_grads=True)]

    return step


def _train(model: nn.Module, config: Any, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    ids = random_ids((workload.tokens // workload.seq_len, workload.seq_len), plan, workload)
    run: Any = torch.compile(model, dynamic=False) if compiled else model
    wanted = list(model.parameters())

    def step() -> list[Tensor]:
        with autocast(workload):
            loss = run(input_ids=ids, labels=ids).loss
        return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]

    return step


def _decode(model: nn.Module, config: Any, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    ids, cache = random_ids((workload.batch, workload.tokens + 1), plan, workload), DynamicCache()
    run: Any = model
    with torch.no_grad():
        run(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def step() -> list[Tensor]:
        logits = run(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(workload.tokens)
        return [logits]

    return step
