from __future__ import annotations

from pathlib import Path

import pytest

RUN = "max_duration: 20ba\nglobal_train_batch_size: 8\ndata: {local: somewhere, domains: {cc: 3, wiki: 1}}\n"


@pytest.fixture
def files(tmp_path: Path, root: Path) -> list[str]:
    """A whole run: a recipe, a model and MoHD settings."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RUN)
    return [str(recipe), str(root / "configs/model/355m.yaml"), str(root / "configs/mohd/x2.yaml")]
