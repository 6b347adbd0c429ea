"""Generates text from a checkpoint of any kind, streaming it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.evaluate.load import load


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Path | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Prints prompt and continuation token by token, then tokens/s on stderr. Returns the continuation.

    Args:
        temperature: 0 always takes the most likely token.
        top_p: sample from the most likely tokens of this probability mass.
        seed: of the sampling.

    Raises:
        UserError: as :func:`mohd_train.evaluate.load.load`, or a prompt that leaves no room in the context.
    """
    loaded = load(
        checkpoint.open(path), tokenizer=tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    model: Any = loaded.model
    tok: Any = loaded.tokenizer
    text = (tok.bos_token or "") + prompt if loaded.ours else prompt
    ids = tok(text, return_tensors="pt", add_special_tokens=not loaded.ours)["input_ids"].to(model.device)
    context = getattr(model.config, "max_position_embeddings", None)
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty and this tokenizer has no BOS to start from: give a few words")
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise UserError(
            f"{ids.shape[1]} tokens of prompt and --max-new-tokens {max_new_tokens} exceed the model's context of {context}"
        )
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    clock = _Clock(tok)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id,
            streamer=clock,
            **sampling,
        )
    new = out.shape[1] - ids.shape[1]
    rate = f"{(new - 1) / (clock.last - clock.first):.1f} tokens/s" if new > 1 else "one token"
    first = clock.first - clock.started
    print(f"{new} tokens, {rate} after the first, which took {first:.2f} s ({loaded.info['name']})", file=sys.stderr)
    return str(tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


class _Clock(TextStreamer):
    """A streamer that records when the first and the last token arrived."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.started = self.first = self.last = time.perf_counter()
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        now = time.perf_counter()
        if self.calls == 2:  # the prompt comes first
            self.first = now
        self.last = now
        super().put(value)
