"""Where the triton kernels can run, and how they are tuned and launched.

On CUDA each kernel times a handful of block sizes at its first call for given widths and keeps the fastest for the rest of the
process. Different block sizes sum in different orders, so two processes that chose differently differ in rounding. The
interpreter (TRITON_INTERPRET=1) takes one tiny size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRECISION = "ieee"  # float32 products as torch computes them by default; bfloat16 is not affected
KEYS = ("OUT", "OUT0", "OUT1", "OUT2", "N", "D", "K", "C", "COUNT")  # arguments whose values block sizes are chosen for


def refusal(device: torch.device, dtype: torch.dtype, width: int | None) -> str | None:
    """Why the kernels can't run there at sub-dimension width `width`, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton kernels need a CUDA device, not {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton kernels need compute capability 8.0 (A100) or newer"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the triton kernels have no {str(dtype).removeprefix('torch.')}"
    if width is not None and not INTERPRETED and (width % 32 or not 64 <= width <= 512):
        return f"the triton kernels support sub-dimension widths 64 to 512 in steps of 32, not {width}"
    return None


class Size(NamedTuple):
    """Block sizes that a kernel may be launched with. A test compiles them all: none spills registers."""

    blocks: dict[str, int]
    warps: int
    stages: int
    capability: int = 80  # the least it is for


# Of kernels that go through rows of C, whatever the tile
ROW_SIZES = (
    Size({"BT": 16, "BC": 64}, 4, 2),
    Size({"BT": 32, "BC": 64}, 4, 2),
    Size({"BT": 16, "BC": 128}, 8, 2),
)  # of kernels that go by rows

Sizes = tuple[Size, ...]
Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class Kernel:
    """A `triton.jit` function with the block sizes to choose among, for all launches or by the tile of the tokens (BM)."""

    def __init__(self, function: Any, sizes: Sizes | Mapping[int, Sizes]) -> None:
        self.function = function
        self._sizes = sizes
        self._tuned: dict[int, Any] = {}

    def sizes(self, tile: int, capability: int) -> list[Size]:
        """What to choose among for tokens in tiles of `tile` on a GPU of this capability (80: sm80)."""
        sizes = self._sizes[tile] if isinstance(self._sizes, Mapping) else self._sizes
        return [size for size in sizes if size.capability <= capability]

    def launch(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        """Runs the kernel on the grid that `grid` derives from the block sizes."""
        if INTERPRETED:
            blocks = dict.fromkeys(self.sizes(64, 90)[0].blocks, 16)
            self.function[grid(blocks)](*arguments, **constants, **blocks)
        else:
            self._tune(constants.get("BM", 0))[grid](*arguments, **constants)

    def _tune(self, tile: int) -> Any:
        if tile not in self._tuned:  # only now, as triton.autotune raises at decoration without a GPU
            major, minor = torch.cuda.get_device_capability()
            sizes = self.sizes(tile, 10 * major + minor)
            configs = [triton.Config(size.blocks, num_warps=size.warps, num_stages=size.stages) for size in sizes]
            key = [name for name in KEYS if name in self.function.arg_names]
            self._tuned[tile] = triton.autotune(configs, key=key)(self.function)
        return self._tuned[tile]


def tuned(sizes: Sizes | Mapping[int, Sizes]) -> Callable[[Any], Kernel]:
    """Decorates a `triton.jit` function: makes it a `Kernel`."""
    return lambda function: Kernel(function, sizes)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors of these shapes and dtypes: what ops return for fake tensors."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)
