"""Sizes that GEMMs take from the host, read once per selection instead of once per op: on CUDA each reading waits for the GPU."""

from __future__ import annotations

from torch import Tensor


def ends_on_host(ends: Tensor) -> list[int]:
    """``ends.tolist()``, kept with the tensor until someone writes to it."""
    if ends.is_inference():  # has no count of writes
        return ends.tolist()
    version, values = getattr(ends, "_on_host", (None, []))
    if version != ends._version:
        values = ends.tolist()
        ends._on_host = (ends._version, values)  # type: ignore[attr-defined]
    return values
