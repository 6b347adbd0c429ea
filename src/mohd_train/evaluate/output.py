"""Where results go: a folder, or object storage (``--output s3://...``), worked on in a local copy."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.storage import Storage, is_remote


class Output:
    """The results of ``output``.

    Attributes:
        folder: where they are read and written; of object storage a copy, which goes with the process once all is stored.

    Raises:
        UserError: no such kind of storage, or no credentials.
    """

    def __init__(self, output: Path | str) -> None:
        self.where = str(output)
        self._storage = Storage(self.where) if is_remote(output) else None
        if self._storage is None:
            self.folder = Path(output)
        else:
            self.folder = Path(tempfile.mkdtemp(prefix="mohd_train-results-"))
            atexit.register(self._clear)
        self._unsent: Path | None = None

    def _clear(self) -> None:
        if self._unsent is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fetch(self, model: str = "") -> None:
        """Brings what is stored, of one model alone where it is named. Raises UserError where the storage can't be reached."""
        if self._storage is None:
            return
        for name in sorted(self._storage.names()):
            if name.endswith(".json") and (not model or name.startswith(f"{model}/")):
                self._storage.download(name, self.folder / name)

    def send(self, path: Path) -> None:
        """Stores a file of :attr:`folder`.

        Raises:
            UserError: it can't be stored. It stays where it is, and the line says so.
        """
        if self._storage is None:
            return
        try:
            self._storage.upload(path.relative_to(self.folder).as_posix(), path)
        except UserError as error:
            self._unsent = path
            raise UserError(f"{error}; the result is whole in {path}, copy it from there") from None


def local(source: Path | str) -> Path:
    """A folder or file of results as it is; those on object storage as a copy. Raises UserError where there are none."""
    if not is_remote(source):
        return Path(source)
    output = Output(source)
    output.fetch()
    return output.folder
