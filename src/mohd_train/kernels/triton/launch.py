"""Where the triton kernels can run, and how they are tuned and launched.

On CUDA a kernel's first call for given widths and dtypes times a handful of block sizes, and the fastest is used for the rest of
the process. Different block sizes sum in different orders, so a run stores its choices (`chosen`) with its checkpoints and uses
them again when it resumes (`use`). The interpreter (TRITON_INTERPRET=1) uses one tiny size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime import OutOfResources

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRECISION = "ieee"  # float32 products as torch computes them by default; bfloat16 is not affected
# The last tile of each possible choice is half empty on average. With more choices than this, tiles of 64 tokens would hold more
# padding than tokens in a microbatch of 16,384, and the GEMMs would do twice the work.
MOST_CHOICES = 512
KEYS = ("OUT", "OUT0", "OUT1", "OUT2", "N", "D", "K", "C", "COUNT")  # arguments whose values block sizes are chosen for


def refusal(device: torch.device, dtype: torch.dtype, width: int | None, choices: int | None) -> str | None:
    """Why the kernels can't run there at sub-dimension width `width` where a token has `choices`, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"the triton kernels need a CUDA device, not {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton kernels need compute capability 8.0 (A100) or newer"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the triton kernels have no {str(dtype).removeprefix('torch.')}"
    if width is not None and not INTERPRETED and (width % 32 or not 64 <= width <= 512):
        return f"the triton kernels support sub-dimension widths 64 to 512 in steps of 32, not {width}"
    if choices is not None and choices > MOST_CHOICES:
        return f"a token has {choices:,} choices of sub-dimensions, and each takes tiles of its own: at most {MOST_CHOICES}"
    return None


class Size(NamedTuple):
    """Block sizes that a kernel may be launched with. A test compiles all of them and checks that none spills registers."""

    blocks: dict[str, int]
    warps: int
    stages: int
    capability: int = 80  # the least it is for


# For kernels that go through rows of C, whatever the tile of the tokens
ROW_SIZES = (
    Size({"BT": 16, "BC": 64}, 4, 2),
    Size({"BT": 32, "BC": 64}, 4, 2),
    Size({"BT": 16, "BC": 128}, 8, 2),
)

Sizes = tuple[Size, ...]
Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class Key(NamedTuple):
    """What block sizes are chosen for."""

    kernel: str
    shapes: tuple[int, ...]  # the values of the kernel's `keys`
    dtypes: tuple[torch.dtype, ...]  # of its tensors


class Kernel:
    """A `triton.jit` function with the block sizes to choose from: the same for all launches, or by the tile of tokens (BM)."""

    def __init__(self, function: Any, sizes: Sizes | Mapping[int, Sizes]) -> None:
        self.function = function
        self._sizes = sizes
        self.name = function.__name__
        tile = ["BM"] if isinstance(sizes, Mapping) else []
        self.keys = [*tile, *[name for name in KEYS if name in function.arg_names]]

    def sizes(self, tile: int, capability: int) -> list[Size]:
        """The sizes to choose from for tokens in tiles of `tile` on a GPU of this capability (80: sm80)."""
        sizes = self._sizes.get(tile, ()) if isinstance(self._sizes, Mapping) else self._sizes
        return [size for size in sizes if size.capability <= capability]

    def launch(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        """Runs the kernel on the grid that `grid` derives from the block sizes."""
        if INTERPRETED:
            blocks = dict.fromkeys(self.sizes(64, 90)[0].blocks, 16)
            self.function[grid(blocks)](*arguments, **constants, **blocks)
            return

        def run(size: Size) -> None:
            self.function[grid](*arguments, **constants, **size.blocks, num_warps=size.warps, num_stages=size.stages)

        named = {**dict(zip(self.function.arg_names, arguments, strict=False)), **constants}
        dtypes = tuple(argument.dtype for argument in arguments if isinstance(argument, Tensor))
        key = Key(self.name, tuple(named[name] for name in self.keys), dtypes)
        if key not in CHOSEN:
            CHOSEN[key] = self.fastest(named.get("BM", 0), run)
        run(CHOSEN[key])

    def fastest(self, tile: int, run: Callable[[Size], None]) -> Size:
        """The size with which `run` takes the least time; the first of equals."""
        return min(self.sizes(tile, capability()), key=lambda size: milliseconds(lambda: run(size)))


CHOSEN: dict[Key, Size] = {}
KERNELS: dict[str, Kernel] = {}  # by name


def capability() -> int:
    """Of the GPU at hand, 90 for sm90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def milliseconds(run: Callable[[], None]) -> float:
    """The time of `run` on the GPU; infinite if it doesn't fit the GPU."""
    try:
        return float(triton.testing.do_bench(run, return_mode="median"))
    except OutOfResources:
        return float("inf")


def chosen() -> dict[str, Any]:
    """The block sizes in use, as plain data: the GPU's architecture, and blocks, warps and stages for each kernel with the shapes
    and dtypes (as JSON) that it ran with. Empty if nothing was chosen yet."""
    sizes = {}
    for key, size in CHOSEN.items():
        shapes = dict(zip(KERNELS[key.kernel].keys, key.shapes, strict=True))
        dtypes = [str(dtype).removeprefix("torch.") for dtype in key.dtypes]
        sizes[json.dumps([key.kernel, shapes, dtypes])] = size._asdict()
    return {"gpu": f"sm{capability()}", "sizes": sizes} if sizes else {}


def use(stored: dict[str, Any]) -> str | None:
    """Uses what an earlier process has `chosen` instead of choosing. All kernels must have been imported.

    Returns:
        Why some of it can't be used and is chosen again, in one line; None if all of it is used.
    """
    CHOSEN.clear()
    if not stored:
        return None
    here, stale = capability(), 0
    if stored["gpu"] != f"sm{here}":
        return (
            f"the block sizes of the triton kernels were chosen on {stored['gpu']}, and this GPU is sm{here}: they are chosen "
            "again, and results differ in rounding"
        )
    for text, fields in stored["sizes"].items():
        name, shapes, dtypes = json.loads(text)
        kernel, size = KERNELS.get(name), Size(**fields)
        if kernel is None or list(shapes) != kernel.keys or size not in kernel.sizes(shapes.get("BM", 0), here):
            stale += 1
            continue
        CHOSEN[Key(name, tuple(shapes.values()), tuple(getattr(torch, dtype) for dtype in dtypes))] = size
    if not stale:
        return None
    return (
        f"{stale} of {len(stored['sizes'])} block sizes of the triton kernels no longer exist: they are chosen again, and "
        "results differ in rounding"
    )


def tuned(sizes: Sizes | Mapping[int, Sizes]) -> Callable[[Any], Kernel]:
    """A decorator that makes a `triton.jit` function a `Kernel`."""

    def make(function: Any) -> Kernel:
        kernel = Kernel(function, sizes)
        KERNELS[kernel.name] = kernel
        return kernel

    return make


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors of these shapes and dtypes: what ops return for fake tensors."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)
