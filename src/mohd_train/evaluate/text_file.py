"""Text files that are never half there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mohd_train.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` whole or not at all: a temporary file beside, fsync, replace. Makes the folder.

    Raises:
        UserError: the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place with --output") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's 0600 would keep colleagues from reading
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
