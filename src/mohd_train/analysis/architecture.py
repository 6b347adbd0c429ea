"""Finds the blocks of any Hugging Face causal LM with their attention and FFN, and hooks what goes in and comes out of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mohd_train.errors import UserError

COMPONENTS = ("attention", "ffn")
# In the order of the computation. `after_attention` is the residual stream once attention has been added.
POINTS = ("block_in", "attention_in", "attention_out", "after_attention", "ffn_in", "ffn_out", "block_out")
COMPONENT_POINTS = ("attention_in", "attention_out", "ffn_in", "ffn_out")

_LOOKS_LIKE = {
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "ffn": re.compile(r"mlp|ffn|feed_?forward|moe", re.IGNORECASE),
}
_IS_NO_COMPONENT = re.compile(r"norm|(^|_)ln(_|$)|dropout|cross", re.IGNORECASE)


@dataclass(frozen=True)
class BlockParts:
    """One block of a model and its two components."""

    block: nn.Module
    attention: nn.Module
    ffn: nn.Module


def find_blocks(model: nn.Module, attention: str | None = None, ffn: str | None = None) -> list[BlockParts]:
    """The blocks of a decoder, first to last.

    The blocks are the ModuleList with the most parameters. A component is the one child of a block whose name, or else
    whose class, looks like it (``self_attn``, ``attention``, ``mlp``, ``feed_forward``, ``block_sparse_moe``, ...).

    Args:
        attention, ffn: names of the children, if they can't be recognized.
    Raises:
        UserError: there are no blocks, or a block has no or several candidates for a component.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"{type(model).__name__} isn't understood: it holds no list of blocks")
    blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
    given = {"attention": attention, "ffn": ffn}
    return [
        BlockParts(block, *(_component(model, block, layer, kind, given[kind]) for kind in COMPONENTS))
        for layer, block in enumerate(blocks)
    ]


def _component(model: nn.Module, block: nn.Module, layer: int, kind: str, given: str | None) -> nn.Module:
    children = {
        name: child for name, child in block.named_children() if not _IS_NO_COMPONENT.search(f"{name} {_class(child)}")
    }
    if given is not None:
        found = [child for name, child in block.named_children() if name == given]
    else:
        pattern = _LOOKS_LIKE[kind]
        found = [child for name, child in children.items() if pattern.search(name)]
        found = found or [child for child in children.values() if pattern.search(_class(child))]
    if len(found) != 1:
        named = ", ".join(f"{name} ({_class(child)})" for name, child in block.named_children())
        raise UserError(
            f"{type(model).__name__} isn't understood: {'none' if not found else len(found)} of the parts of its block {layer} "
            f"({_class(block)}: {named or 'none'}) {'is' if not found else 'look like'} its {kind}; "
            f"name the part with --{kind}-module, if it has one"
        )
    return found[0]


def _class(module: nn.Module) -> str:
    return type(module).__name__


Receive = Callable[[int, str, Tensor], None]


@dataclass
class Hooks:
    """State of :func:`hooked`.

    Attributes:
        residual_error: [L] largest ``mean |block_out - (block_in + attention_out + ffn_out)| / mean |block_out|`` seen. Near 0
            for a block that only adds its components' outputs to its input. In others (with norms after the components, for
            example) these outputs are not what reaches the residual stream, and the reader has to know.
    """

    residual_error: list[float]
    _current: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@contextmanager
def hooked(parts: list[BlockParts], receive: Receive) -> Iterator[Hooks]:
    """Within it, every forward pass calls ``receive(layer, point, x)`` for each of :data:`POINTS`, x [B, T, D] in float32.

    If a component adds the residual itself (a parameter of its ``forward`` is named ``residual...``), it is subtracted, so
    that an output is always what the component contributes. Nothing is kept longer than a block runs.

    The forward pass raises UserError if a component doesn't have the block's hidden size.
    """
    hooks = Hooks([0.0] * len(parts))
    handles = []
    for layer, part in enumerate(parts):
        handles += [
            part.block.register_forward_pre_hook(_block_entry(hooks, layer, receive), with_kwargs=True),
            part.attention.register_forward_hook(_component_exit(hooks, layer, "attention", receive), with_kwargs=True),
            part.ffn.register_forward_hook(_component_exit(hooks, layer, "ffn", receive), with_kwargs=True),
            part.block.register_forward_hook(_block_exit(hooks, layer, receive)),
        ]
    try:
        yield hooks
    finally:
        for handle in handles:
            handle.remove()


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, the first parameter first. Looser than ``Signature.bind``, since decorators rename them."""
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    return {names[0]: given[names[0]], **given}


def _block_entry(hooks: Hooks, layer: int, receive: Receive) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _hidden(next(iter(_arguments(module, args, kwargs).values())), module)
        hooks._current[layer] = {"block_in": x}
        receive(layer, "block_in", x)

    return hook


def _component_exit(hooks: Hooks, layer: int, kind: str, receive: Receive) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = _arguments(module, args, kwargs)
        current = hooks._current[layer]
        x, y = _hidden(next(iter(arguments.values())), module), _hidden(output, module)
        residual = next((value for name, value in arguments.items() if name.startswith("residual")), None)
        block_in = current["block_in"]
        for tensor in (x, y):
            if tensor.shape != block_in.shape:
                raise UserError(
                    f"the {kind} {_class(module)} isn't understood: its input or output is {list(tensor.shape)}, its block's "
                    f"{list(block_in.shape)}; name another part with --{kind}-module"
                )
        if residual is not None:
            y = y - residual.detach().float()
        current[f"{kind}_out"] = y
        receive(layer, f"{kind}_in", x)
        receive(layer, f"{kind}_out", y)
        if kind == "attention":
            receive(layer, "after_attention", block_in + y)

    return hook


def _block_exit(hooks: Hooks, layer: int, receive: Receive) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, parts = _hidden(output, module), hooks._current.pop(layer)
        receive(layer, "block_out", x)
        for kind in COMPONENTS:
            if f"{kind}_out" not in parts:
                raise UserError(
                    f"block {layer} ({_class(module)}) never called its {kind}; name it with --{kind}-module"
                )
        error = (x - parts["block_in"] - parts["attention_out"] - parts["ffn_out"]).abs().mean() / x.abs().mean().clamp(
            min=torch.finfo(torch.float32).tiny
        )
        hooks.residual_error[layer] = max(hooks.residual_error[layer], error.item())

    return hook


def _hidden(value: Any, module: nn.Module) -> Tensor:
    """The hidden states [B, T, D] in a module's input or output, in float32. A copy, since some models add in place."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(first, Tensor) or first.dim() != 3:
        raise UserError(
            f"{_class(module)} isn't understood: its first input or output is not a tensor [batch, tokens, hidden size]; "
            "name another part with --attention-module or --ffn-module"
        )
    return first.detach().to(torch.float32, copy=True)
