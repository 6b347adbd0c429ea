"""Text to token ids, and what a tokenizer puts around them.

A Hugging Face tokenizer adds what it was saved with: BOS in front (LLaMA), EOS behind (``add_eos_token=true``), both
(a template in ``tokenizer.json``) or nothing. Nothing here relies on that: a text is encoded alone, and whoever needs a
boundary adds it by its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohd_train.errors import UserError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "the", "1", ".", "w5")  # short texts of which any tokenizer knows one


def open_tokenizer(folder: str | Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, which would otherwise ask on standard input whether to run a folder's code.

    Raises:
        UserError: it has code of its own, which is not trusted.
        Exception: whatever transformers and tokenizers raise.
    """
    from transformers import AutoTokenizer

    with custom_code_refused(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


@contextmanager
def custom_code_refused(place: str | Path) -> Iterator[None]:
    """Turns the error of transformers for a model or tokenizer with code of its own into a UserError."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{place} has its own Python code, which is not run; if you trust it and the command has the option, add "
            "--trust-remote-code"
        ) from None


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text alone: no BOS, no EOS, nothing cut, however the tokenizer is configured."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, truncation=False, verbose=False)
    ids: Any = encoded["input_ids"]
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """:func:`encode_texts` of one."""
    return encode_texts(tokenizer, [text])[0]


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds by itself (in front of a text, behind it).

    Raises:
        UserError: it encodes a text in another way when it adds them, so that they can't be told from the text.
    """
    special = set(tokenizer.all_special_ids)
    alone = {probe: encode_text(tokenizer, probe) for probe in _PROBES}
    known = [probe for probe, ids in alone.items() if ids and not special.intersection(ids)]
    for probe in known or [probe for probe, ids in alone.items() if ids]:
        whole, text = tokenizer(probe, return_attention_mask=False, verbose=False)["input_ids"], alone[probe]
        for start in range(len(whole) - len(text) + 1):
            if whole[start : start + len(text)] == text:
                return whole[:start], whole[start + len(text) :]
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path} doesn't encode a text the same way with and without special tokens; "
        "BOS and EOS can't be told from text"
    )


def append_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Configures the tokenizer to append nothing to a text (a prompt that ends in EOS asks for another document). What
    it puts in front stays.

    Raises:
        UserError: it can't be configured.
    """
    before, behind = added_ids(tokenizer)
    if not behind:
        return
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
        tokenizer.init_kwargs["add_eos_token"] = False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and added_ids(tokenizer)[1]:
        from tokenizers import Tokenizer

        described = json.loads(backend.to_str())
        described["post_processor"] = _without_specials(described["post_processor"])
        rebuilt = Tokenizer.from_str(json.dumps(described)).post_processor
        backend.post_processor = _with_template(rebuilt, tokenizer.convert_ids_to_tokens(before), before)
    if added_ids(tokenizer) != (before, []):
        tokens = " ".join(tokenizer.convert_ids_to_tokens(behind))
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} appends {tokens} to every text and can't be told not to; "
            "turn it off in its tokenizer_config.json (add_eos_token) or tokenizer.json (post_processor)"
        )


def _without_specials(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor as JSON without the parts that add tokens."""
    if processor is None or processor["type"] in ("TemplateProcessing", "RobertaProcessing", "BertProcessing"):
        return None
    if processor["type"] == "Sequence":
        kept = [part for one in processor["processors"] if (part := _without_specials(one)) is not None]
        return {**processor, "processors": kept} if kept else None
    return processor


def _with_template(others: Any, tokens: list[str], ids: list[int]) -> Any:
    """A post-processor that prepends ``tokens`` to each text, after the ``others`` (offsets)."""
    from tokenizers import processors

    if not tokens:
        return others or processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    front = [*tokens, "$A"], [*tokens, "$A", *(f"{token}:1" for token in tokens), "$B:1"]
    template = processors.TemplateProcessing(
        single=front[0], pair=front[1], special_tokens=list(zip(tokens, ids, strict=True))
    )
    return processors.Sequence([others, template]) if others is not None else template
