"""A small sentencepiece tokenizer in the manner of LLaMA's: BPE with byte fallback, BOS and EOS, nothing normalized."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic

VOCAB_SIZE = 4096
SAMPLE_CHARS = 3_000_000  # enough for a vocabulary of this size, learned in seconds
LONGEST_LINE = 4096  # bytes; longer ones are cut, not dropped


def _lines(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Lines of the texts, until ``limit`` characters have been given."""
    given = 0
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), LONGEST_LINE // 4):  # a character has at most 4 bytes
                yield line[start : start + LONGEST_LINE // 4]
        given += len(text)
        if given >= limit:
            return


def train_tokenizer(
    texts: Iterator[str], model: Path, *, vocab_size: int = VOCAB_SIZE, sample_chars: int = SAMPLE_CHARS
) -> sentencepiece.SentencePieceProcessor:
    """Learns a tokenizer from the first ``sample_chars`` characters of ``texts`` and writes it to ``model``.

    The settings are LLaMA's: digits apart, byte fallback for unknown characters, whitespace kept, ids 0 unknown,
    1 BOS, 2 EOS. The same texts give the same tokenizer.

    Raises:
        UserError: too little text for a vocabulary of ``vocab_size``; or ``model`` is there and holds something else.
    """
    learned = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, sample_chars),
            model_writer=learned,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            max_sentence_length=LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except UserError:  # about the texts
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"no tokenizer of {vocab_size} pieces can be learned from this text ({reason}); give more text"
        ) from None
    if (
        model.exists() and model.read_bytes() != learned.getvalue()
    ):  # data and checkpoints may need the one that is there
        raise UserError(
            f"{model} exists, and is not the tokenizer that this text gives; choose another name, or remove it"
        )
    write_atomic(model, learned.getvalue())
    return load_tokenizer(model)


def load_tokenizer(model: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in a ``.model`` file. Raises :class:`UserError` where there is none or it is broken."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{model}: no sentencepiece model ({reason}); remove it and run again") from None
