"""Files that come with the package: configs, the evaluation's tasks and demo questions, the paper's numbers, launch templates.

In a checkout, and where it is installed with ``pip install -e``, they are its own folders, which may be edited. A wheel
carries copies in ``mohd_train/_data``, under the same names (setup.py makes them).
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from mohd_train.errors import UserError

# Relative to the root of a checkout; read by setup.py too.
CARRIED = ("configs", "eval/tasks.yaml", "eval/paper", "eval/demo_questions", "scripts/launch")


def root() -> Path:
    """The folder that the names in :data:`CARRIED` are relative to: ``_data`` of an installed wheel, or the checkout."""
    package = Path(str(importlib.resources.files("mohd_train")))
    data = package / "_data"
    return data if data.is_dir() else package.parent.parent


def path(name: str) -> Path:
    """A file or folder of the package, by its path in the repository: ``path("configs/model/355m.yaml")``.

    Raises:
        UserError: the installation does not have it.
    """
    found = root() / name
    if not found.exists():
        raise UserError(f"this installation of mohd_train lacks {name} (looked for {found}); install it again")
    return found


def find(name: str | Path) -> Path:
    """What a user means by ``name``: the file or folder of that name if there is one; else the package's own, if it has one.

    So ``configs/recipe/demo.yaml`` can be named from any folder, and a file of that name in the current folder wins.
    A name that is neither is returned unchanged: the caller reports what is missing.
    """
    given = Path(name)
    ours = given.as_posix()
    carried = ".." not in given.parts and any(ours == one or ours.startswith(f"{one}/") for one in CARRIED)
    if carried and not given.exists() and (root() / given).exists():
        return root() / given
    return given
