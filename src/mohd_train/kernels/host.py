"""Group ends on the host, where GEMMs take their sizes from.

One explicit op per selection copies them into a tensor in host memory, which every GEMM of that selection takes as an argument and
autograd saves like any other input. Nothing is remembered on a tensor: inductor reuses the memory of one component's ends for
those of the next under the same Python object, without telling autograd's version counter.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mohd::ends_to_host", mutates_args=())
def _ends_to_host(ends: Tensor) -> Tensor:
    return ends.to("cpu", copy=True)


_ends_to_host.register_fake(lambda ends: torch.empty(ends.shape, dtype=ends.dtype, device="cpu"))


def ends_to_host(*ends: Tensor) -> tuple[Tensor, ...]:
    """Each int64 tensor in host memory: on CUDA by one copy for all, which waits for the device. Lists of them cost no wait."""
    if ends[0].is_cpu and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        return ends  # spares decoding the cost of a registered op
    together = ends[0] if len(ends) == 1 else torch.cat(ends)
    return torch.split(_ends_to_host(together), [part.shape[0] for part in ends])
