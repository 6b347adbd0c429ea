"""Whether a checkpoint's bytes are those that were written: the checksums that its files carry.

torch.save writes a zip, with a CRC-32 of each entry; a sharded checkpoint is a row of such zips. Loading doesn't
compare them: a flipped bit would silently become a weight.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from mohd_train.errors import UserError
from mohd_train.utils.text import first_line

BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)


def verify_file(path: Path) -> None:
    """Reads a checkpoint file to its end. Raises UserError, naming the entry, if its content differs from its
    checksum."""
    _verify(path, path, str(path))


def verify_sharded(path: Path, storage_data: dict[Any, Any]) -> None:
    """The same for every part of a sharded checkpoint.

    Args:
        storage_data: of its metadata: where each part is.
    """
    parts = sorted(storage_data.items(), key=lambda part: (part[1].relative_path, part[1].offset))
    for index, info in parts:
        with (path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        _verify(path, content, f"{path / info.relative_path}, {index.fqn}")


def _verify(checkpoint: Path, content: Path | IO[bytes], where: str) -> None:
    try:
        with zipfile.ZipFile(content) as archive:
            entry = archive.testzip()
    except BROKEN as error:
        raise UserError(f"{where} is corrupt ({first_line(error)}); use an earlier checkpoint") from None
    if entry is not None:
        raise UserError(f"{where} is corrupt: {entry} differs from its checksum; use an earlier checkpoint")
