"""One result for all processes of a run: work on rank 0, and errors that every process raises together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from composer.utils import dist

from mohd_train.errors import UserError

T = TypeVar("T")


def raise_first(error: str | None) -> None:
    """Raises UserError in every process if one of them has an ``error``: none is left waiting for the others."""
    found = next((text for text in dist.all_gather_object(error) if text is not None), None)
    if found is not None:
        raise UserError(found)


def _run_if(is_mine: bool, work: Callable[[], T]) -> T | None:
    """The result of ``work`` in the processes that run it, None elsewhere; a UserError it raises is raised everywhere."""
    result, error = None, None
    if is_mine:
        try:
            result = work()
        except UserError as found:
            error = str(found)
    raise_first(error)
    return result


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """The result of ``work`` on rank 0, None elsewhere; a UserError it raises is raised everywhere."""
    return _run_if(dist.get_global_rank() == 0, work)


def from_rank_zero(work: Callable[[], T]) -> T:
    """The result of ``work``, which runs on rank 0 alone, in every process; a UserError it raises is raised
    everywhere."""
    box: list[T | None] = [on_rank_zero(work)]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def from_first_of_node(work: Callable[[], T]) -> T:
    """As :func:`from_rank_zero`, with one process of each node doing the work."""
    result = _run_if(dist.get_local_rank() == 0, work)
    everyone = dist.all_gather_object((dist.get_node_rank(), dist.get_local_rank(), result))
    return next(value for node, rank, value in everyone if node == dist.get_node_rank() and rank == 0)  # type: ignore[return-value]
