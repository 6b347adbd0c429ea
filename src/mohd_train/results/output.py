"""Where results go: a folder, or object storage (``--output s3://...``) with a local working copy."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from mohd_train.errors import UserError
from mohd_train.storage import Storage, is_remote


class Output:
    """The place that ``--output`` names.

    Attributes:
        folder: where results are read and written; for object storage, a temporary copy that is removed at exit unless an
            upload failed.

    Raises:
        UserError: unknown kind of storage, or no credentials.
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
        """Downloads the stored results (of one model, if named). Raises UserError if the storage can't be reached."""
        if self._storage is None:
            return
        for name in sorted(self._storage.names()):
            if name.endswith(".json") and (not model or name.startswith(f"{model}/")):
                self._storage.download(name, self.folder / name)

    def send(self, path: Path) -> None:
        """Uploads a file of :attr:`folder`.

        Raises:
            UserError: the upload failed. The file stays where it is, and the message says where.
        """
        if self._storage is None:
            return
        try:
            self._storage.upload(path.relative_to(self.folder).as_posix(), path)
        except UserError as error:
            self._unsent = path
            raise UserError(f"{error}; the result is complete in {path}, copy it from there") from None


def local_copy(source: Path | str) -> Path:
    """A local file or folder of results unchanged; a download of one on object storage. Raises UserError if that fails."""
    if not is_remote(source):
        return Path(source)
    output = Output(source)
    output.fetch()
    return output.folder
