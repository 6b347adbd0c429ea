"""Blocks of the eager fusion; its results are compared with the reference's in grouped/test_products.py."""

from __future__ import annotations

import torch

from mohd_train.kernels import fusion


def test_a_gpu_takes_few_blocks() -> None:
    """Each is some ten launches: those of a CPU's cache would be a thousand for the tokens of a step."""
    found = fusion.blocks(32768, 4096, torch.device("cuda"))
    assert len(found) == 4
    assert found[-1] == (24576, 32768)
    assert len(fusion.blocks(32768, 4096, torch.device("cpu"))) == 1024
