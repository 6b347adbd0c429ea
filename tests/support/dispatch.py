"""Counts the operations that wait for the host in deterministic mode on CUDA: below autograd, and within the project's own ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

# CUDA's deterministic mode makes sorts with blocking copies of the first group; the second reads sizes or values back as it is.
SORTED = {
    "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_put", "index_put_",
    "_index_put_impl_", "_unsafe_index_put", "index_add", "index_add_", "index_copy", "index_copy_", "index_reduce_", "put_",
}  # fmt: skip
READ = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}
UPLOADED = {"lift_fresh", "lift_fresh_copy"}  # what `torch.tensor` of a list ends in
TO_HOST = "ends_to_host"


@contextmanager
def host_syncs() -> Iterator[HostSyncs]:
    """In deterministic mode, forward and backward."""
    mode, plain = HostSyncs(), Tensor.tolist

    def listed(tensor: Tensor) -> Any:
        mode.lists += 1
        places = {part.untyped_storage().data_ptr() for part in mode.on_host}
        mode.foreign += tensor.untyped_storage().data_ptr() not in places
        return plain(tensor)

    torch.use_deterministic_algorithms(True)
    with mock.patch.object(Tensor, "tolist", listed), mode:
        yield mode
    torch.use_deterministic_algorithms(False)


class HostSyncs(TorchDispatchMode):
    """Counts by name what runs while it is entered; `lists` counts tensors made lists of, `foreign` those of them that
    `ends_to_host` didn't bring to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.on_host: list[Tensor] = []
        self.lists = self.foreign = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        self.counts[name] += 1
        if namespace != "mohd":
            return func(*args, **(kwargs or {}))
        with self:  # a registered op is opaque to the mode: its Python body is run in its place
            out = OPDEFS[f"mohd::{name}"]._init_fn(*args, **(kwargs or {}))
        if name == TO_HOST:
            self.on_host.append(out)
        return out

    @property
    def waits(self) -> dict[str, int]:
        """What would wait for the host, apart from `ends_to_host`."""
        return {name: count for name, count in self.counts.items() if name in SORTED | READ}

    @property
    def uploads(self) -> int:
        """Lists that became tensors."""
        return sum(self.counts[name] for name in UPLOADED)
