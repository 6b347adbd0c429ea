"""Checkpoints: ``checkpoint.open(path)`` is the one place that knows what a path is.

``read`` tells the kinds apart and reads the native ones, ``sharded`` reads a folder of torch.distributed.checkpoint,
``identity`` holds what tells one checkpoint, or one tokenizer, from another; ``save`` and ``resume`` are the trainer's.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mohd_train.checkpoint.read import Checkpoint, exists, kind_of, open, open_native, resolve

__all__ = ["Checkpoint", "exists", "kind_of", "open", "open_native", "resolve"]


def __getattr__(name: str) -> Any:
    """Imports ``read``, which takes seconds, only when it is used: ``identity`` alone needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mohd_train.checkpoint import read

    return getattr(read, name)
