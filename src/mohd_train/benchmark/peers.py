"""The models that a user would use instead, timed in turn with ours, at equal sizes.

``355m:hf-llama`` is transformers' ``LlamaForCausalLM`` (or one ``LlamaDecoderLayer``) of the base model's size, ``355m:litgpt``
litgpt's ``GPT`` (or one ``Block``). Both have our dense model's weights, and their output is compared with its before they are
timed. ``355m:hf-mixtral-x2`` is transformers' Mixtral, as large as ``355m:moe-x2``: the same number of experts, of the same width,
and as many for each token (Mixtral has no shared experts, so its router chooses all of them).

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

LLAMA, MIXTRAL, LITGPT = "hf-llama", "hf-mixtral-", "litgpt"
MODES = ("layer", "train", "decode")
# litgpt's names of our parameters; its qkv is q, k and v concatenated
LITGPT_NAMES = {
    "embedding.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.attention_norm.weight": "transformer.h.{}.norm_1.weight",
    "blocks.{}.ffn_norm.weight": "transformer.h.{}.norm_2.weight",
    **{f"blocks.{{}}.attention.{x}_proj.weight": f"transformer.h.{{}}.attn.{x}.weight" for x in "qkv"},
    "blocks.{}.attention.o_proj.weight": "transformer.h.{}.attn.proj.weight",
    "blocks.{}.ffn.gate_proj.weight": "transformer.h.{}.mlp.fc_1.weight",
    "blocks.{}.ffn.up_proj.weight": "transformer.h.{}.mlp.fc_2.weight",
    "blocks.{}.ffn.down_proj.weight": "transformer.h.{}.mlp.proj.weight",
}


def is_peer(name: str) -> bool:
    """Whether ``355m:...`` is a model of transformers or litgpt."""
    peer = name.partition(":")[2]
    return peer == LITGPT or peer.startswith((LLAMA, MIXTRAL))


def plan_of(name: str, workload: Workload) -> ModelPlan:
    """Our plan of the same size.

    Raises:
        UserError: an unknown peer, or a mode that peers don't have.
    """
    base, _, peer = name.partition(":")
    modes = MODES[:2] if peer == LITGPT else MODES
    if workload.mode not in modes:
        raise UserError(f"--models {name}: the modes of {peer} are {', '.join(modes)}")
    if peer in (LLAMA, LITGPT):
        return read_plan(f"{base}:dense", workload)
    if not peer.startswith(MIXTRAL):
        raise UserError(f"--models {name}: give {LLAMA}, {LITGPT}, or {MIXTRAL}x2, ...")
    return read_plan(f"{base}:moe-{peer.removeprefix(MIXTRAL)}", workload)


def build(name: str, plan: ModelPlan, workload: Workload) -> tuple[Step, nn.Module]:
    """The step to time, and the module that it runs.

    Raises:
        UserError: litgpt is asked for and not installed.
    """
    return _litgpt(plan, workload) if name.endswith(f":{LITGPT}") else _transformers(plan, workload)


def _transformers(plan: ModelPlan, workload: Workload) -> tuple[Step, nn.Module]:
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

    def forward() -> Tensor:
        out = run(x, position_embeddings=table, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    return _with_gradients(forward, [x, *layer.parameters()], slope, workload)


def _with_gradients(
    forward: Callable[[], Tensor], wanted: list[Tensor], slope: Tensor | None, workload: Workload
) -> Step:
    """Forward and backward: the output, then the gradients of ``wanted``; ``slope`` is the output's own gradient."""

    def step() -> list[Tensor]:
        with autocast(workload):
            out = forward()
        return [out.detach(), *torch.autograd.grad(out, wanted, slope, allow_unused=True, materialize_grads=True)]

    return step


def _train(model: nn.Module, config: Any, plan: ModelPlan, workload: Workload, compiled: bool) -> Step:
    ids = random_ids((workload.tokens // workload.seq_len, workload.seq_len), plan, workload)
    run: Any = torch.compile(model, dynamic=False) if compiled else model
    return _with_gradients(lambda: run(input_ids=ids, labels=ids).loss, list(model.parameters()), None, workload)


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


def _litgpt(plan: ModelPlan, workload: Workload) -> tuple[Step, nn.Module]:
    try:
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy
    except ImportError as error:
        raise UserError(
            f"{LITGPT} can't be imported ({error}); make benchmark-peers installs it into .peers"
        ) from error
    layers = 1 if workload.mode == "layer" else plan.num_hidden_layers
    config = Config(
        block_size=workload.seq_len, vocab_size=plan.vocab_size, padded_vocab_size=plan.vocab_size, n_layer=layers,
        n_head=plan.num_attention_heads, n_query_groups=plan.num_key_value_heads, head_size=plan.head_dim, n_embd=plan.hidden_size,
        intermediate_size=plan.intermediate_size, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", norm_eps=plan.rms_norm_eps,
        rope_base=int(plan.rope_theta), rotary_percentage=1.0, parallel_residual=False, bias=False,
    )  # fmt: skip
    ours = renamed_weights(Transformer(plan, seed=0).state_dict(), LITGPT_NAMES)
    for layer in range(plan.num_hidden_layers):
        prefix = f"transformer.h.{layer}.attn."
        ours[f"{prefix}qkv.weight"] = torch.cat([ours.pop(f"{prefix}{x}.weight") for x in "qkv"])
    model = GPT(config)
    model.load_state_dict({name: ours[name] for name in model.state_dict()})
    model.to(workload.device)
    rows = workload.tokens // workload.seq_len
    if workload.mode == "layer":
        block, cos, sin = model.transformer.h[0], model.cos[None], model.sin[None]
        shape = (rows, workload.seq_len, plan.hidden_size)
        x, slope = random_values(shape, workload).requires_grad_(), random_values(shape, workload)
        run: Any = torch.compile(block, fullgraph=True, dynamic=False) if workload.compile else block
        return _with_gradients(lambda: run(x, cos, sin), [x, *block.parameters()], slope, workload), block
    ids = random_ids((rows, workload.seq_len), plan, workload)
    run = torch.compile(model, dynamic=False) if workload.compile else model

    def loss() -> Tensor:
        return chunked_cross_entropy(run(ids)[:, :-1], ids[:, 1:], chunk_size=0)

    return _with_gradients(loss, list(model.parameters()), None, workload), model
