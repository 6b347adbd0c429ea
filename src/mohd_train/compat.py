"""What is patched in Composer, streaming and W&B, and why. Each patch lasts only as long as it is needed, and checks
that what it replaces exists: a release that renames it fails with its name, not with a wrong result.

Versions: Composer 0.32 (its last release; the repository is in maintenance), streaming 0.12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, ``owner.name`` is ``replacement(original)``.

    Raises:
        AttributeError: ``owner`` has no such attribute: the library has changed.
    """
    original = getattr(owner, name)
    setattr(owner, name, replacement(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def composer_saves_atomically(
    write: Callable[[dict[str, Any], str], None], save_sharded: Callable[[Callable[[str], str | None], str], str | None]
) -> Iterator[None]:
    """Composer writes checkpoints straight to their final names and has no hook for it
    (``composer/utils/checkpoint.py``), so a kill leaves half a file under a good name.

    Args:
        write: in place of ``_write_checkpoint_file(state_dict, filename)``.
        save_sharded: ``(save, filename)``, around ``_save_checkpoint`` of a sharded state.
    """
    from composer.utils import checkpoint

    def save(original: Callable[..., str | None]) -> Callable[..., str | None]:
        def saved(state: Any, save_filename: str, **arguments: Any) -> str | None:
            if state.fsdp_sharded_state_dict_enabled:
                return save_sharded(lambda filename: original(state, filename, **arguments), save_filename)
            return original(state, save_filename, **arguments)

        return saved

    with (
        replaced(checkpoint, "_write_checkpoint_file", lambda _: write),
        replaced(checkpoint, "_save_checkpoint", save),
    ):
        yield


@contextmanager
def streaming_finds_one_name_a_node(beyond: int = 0) -> Iterator[None]:
    """Every process of a node uses the name in shared memory that its first one found. In streaming each looks for
    itself, at its own moment (``streaming/base/shared/prefix.py``): if another run starts or ends in between, they find
    different ones and the start fails.

    Args:
        beyond: of the node's first process: how many names after the first free one to take. Streaming's names are numbers.
    """
    from composer.utils import dist
    from streaming.base.shared import prefix

    def finder(original: Callable[..., int]) -> Callable[..., int]:
        def find(*args: Any, **kwargs: Any) -> int:
            found: int | str | None = None
            if dist.get_local_rank() == 0:
                try:
                    found = original(*args, **kwargs) + beyond
                except ValueError as error:
                    found = str(error)
            found = dist.all_gather_object(found)[dist.get_global_rank() - dist.get_local_rank()]
            if not isinstance(found, int):
                raise ValueError(found)
            return found

        return find

    with replaced(prefix, "_check_and_find_retrying", finder):
        yield


def wandb_has_get_url() -> None:
    """From 0.20 on a W&B run has ``url`` in place of the ``get_url()`` that Composer 0.32's logger calls."""
    from wandb.sdk.wandb_run import Run

    run_class: Any = Run
    if not hasattr(run_class, "get_url"):
        run_class.get_url = lambda run: run.url


def deterministic_without_filling_memory() -> None:
    """Deterministic mode would also fill what ``torch.empty`` returns, at a cost; nothing here reads memory that it hasn't
    written."""
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
