"""What every checkpoint says of itself, and whether one may be loaded into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from composer.core import Callback
from composer.utils import parse_uri

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.model.checkpoint import read_checkpoint

LATEST = "latest-rank0.pt"


class RunMetadata(Callback):
    """Puts what export and evaluation need in every checkpoint, at ``state/callbacks/RunMetadata``.

    A callback's state is Composer's place for it: ``state/metadata`` and ``state/integrations`` take no entries of ours.

    Args:
        values: ``plan`` (``ModelPlan.to_dict``), ``run_name``, ``tokenizer_sha256``, ``seq_len``, ``version``: plain data.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        """The values, as they are."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is taken over: :func:`check_checkpoint` compares the two before the load."""


def latest_checkpoint(folder: str) -> Path | None:
    """The checkpoint that autoresume takes: what the ``latest`` link of ``folder`` points to."""
    link = Path(folder) / LATEST
    return link.resolve() if link.exists() else None


def check_checkpoint(path: str, plan: ModelPlan, shapes: dict[str, torch.Size], tokenizer_sha256: str) -> None:
    """Refuses a checkpoint that is not one of this model, naming what differs.

    Args:
        path: a local file; a remote one is left to Composer, which loads strictly.
        plan: this run's model.
        shapes: its parameters, name -> shape.
        tokenizer_sha256: the tokenizer of this run's data.

    Raises:
        UserError: another architecture or tokenizer, parameters missing, unexpected or of another shape.
    """
    if parse_uri(path)[0]:
        return
    metadata, weights = read_checkpoint(Path(path))
    differences = plan.differences(ModelPlan.from_dict(metadata["plan"]))
    if differences:
        raise UserError(
            f"{path} is of another architecture ({'; '.join(differences)}); give its own model and mohd config"
        )
    if metadata["tokenizer_sha256"] != tokenizer_sha256:
        raise UserError(
            f"{path} was trained with another tokenizer than this data's; prepare the data with the checkpoint's"
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
