"""Checkpoints of every kind, read: ``checkpoint.open(path)`` is the one place that knows what a path is.

``read`` tells the kinds apart and reads the native ones, ``sharded`` reads a folder of torch.distributed.checkpoint,
``identity`` holds what tells one checkpoint, or one tokenizer, from another.
"""

from mohd_train.checkpoint.read import Checkpoint, exists, kind_of, open, open_native, resolve

__all__ = ["Checkpoint", "exists", "kind_of", "open", "open_native", "resolve"]
