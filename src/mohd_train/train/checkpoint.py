"""What every checkpoint says of itself, and whether one may be loaded into a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback

from mohd_train.checkpoint import open_native
from mohd_train.checkpoint.identity import check_tokenizer
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import LATEST, checkpoints_in


class RunMetadata(Callback):
    """Puts what export and evaluation need in every checkpoint, at ``state/callbacks/RunMetadata``.

    A callback's state is Composer's place for it: ``state/metadata`` and ``state/integrations`` take no entries of ours.

    Args:
        values: ``plan`` (``ModelPlan.to_dict``), ``run_name``, ``tokenizer_sha256``, ``seq_len``, ``version``: plain data.
        text: for sharded checkpoints, as JSON under ``json``: there each value would be an entry of its own, and a key that the
            next session's config has more could not be loaded.
    """

    def __init__(self, values: dict[str, Any], *, text: bool = False) -> None:
        self.values = values
        self.text = text

    def state_dict(self) -> dict[str, Any]:
        """The values, as they are."""
        return {"json": json.dumps(self.values)} if self.text else dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is taken over: :func:`check_checkpoint` compares the two before the load."""


def whole_run(checkpoint: Path) -> list[str]:
    """``checkpoint`` and those before it in its folder, oldest first: what keep-last-K counts."""
    found = list(checkpoints_in(checkpoint.parent).values())
    return [str(path) for path in found[: found.index(checkpoint) + 1]]


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line for each newer one that is broken, such as one that a kill cut short.

    Composer's ``latest`` link alone would not do: for a moment between two saves there is none, and a run killed then would
    start over in silence.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints_in(folder).values()):
        try:
            open_native(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        return path, skipped
    if skipped:
        raise UserError(f"no checkpoint in {folder} is whole; {skipped[0]} (or save_overwrite=true to start over)")
    return None, []


def latest_in(folder: Path) -> str | None:
    """The newest checkpoint of a folder by name, for messages."""
    found = list(checkpoints_in(folder).values())
    return str(found[-1]) if found else None


def point_latest(checkpoint: Path) -> None:
    """Lets Composer's autoresume find ``checkpoint``."""
    temporary = checkpoint.with_name(f".{LATEST}.{os.getpid()}")
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, checkpoint.with_name(LATEST))


def check_checkpoint(
    path: str, plan: ModelPlan, shapes: dict[str, torch.Size], tokenizer_sha256: str, tokenizer_folder: Path
) -> None:
    """Refuses a checkpoint that is not one of this model, naming what differs.

    Args:
        path: a local file, or the folder of a sharded checkpoint.
        plan: this run's model.
        shapes: its parameters, name -> shape.
        tokenizer_sha256: the tokenizer of this run's data, as its manifest names it.
        tokenizer_folder: where that lies.

    Raises:
        UserError: another architecture or tokenizer, parameters missing, unexpected or of another shape.
    """
    found = open_native(path)
    assert found.plan is not None, "a native checkpoint"
    weights, differences = found.tensors(meta=True), plan.differences(found.plan)
    if differences:
        raise UserError(
            f"{path} is of another architecture ({'; '.join(differences)}); give its own model and mohd config"
        )
    check_tokenizer(
        found.tokenizer_sha256,
        tokenizer_sha256,
        what=f"{path} was trained with another tokenizer than this data's",
        remedy="prepare the data with the checkpoint's",
        folder=tokenizer_folder,
    )
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unexpected:
        names = ", ".join(
            [f"{name} missing" for name in missing[:2]] + [f"{name} unexpected" for name in unexpected[:2]]
        )
        match = f"{len(shapes) - len(missing)} of {len(shapes)} match"
        raise UserError(f"{path} does not hold this model's parameters ({match}; {names})")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{path}: {name} is {list(weights[name].shape)} there, {list(shape)} here")
