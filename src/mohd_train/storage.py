"""Object storage (``s3://``, ``gs://``, ``oci://``, ``azure://``) through Composer's object stores, with logged retries.

S3-compatible servers of one's own are named by ``S3_ENDPOINT_URL``; keys come from the environment or their library's files.
"""

from __future__ import annotations

import atexit
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mohd_train.errors import UserError, causes

if TYPE_CHECKING:
    from composer.utils import ObjectStore

log = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 6
WAIT = 1.0  # seconds before the second attempt, doubled before each further one: half a minute in all
BACKENDS = ("s3", "gs", "oci", "azure")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUSY = (408, 425, 429)  # the 4xx answers that a retry may change


def is_remote(path: object) -> bool:
    """Whether ``path`` is a URI and not a local path."""
    return _URI.match(str(path)) is not None


def refuse_remote(path: object, key: str, instead: str) -> None:
    """Raises UserError if ``path`` is a URI: otherwise a local folder of that name would be created. ``instead``: what to do."""
    if is_remote(path):
        raise UserError(f"{key} is {path}; it must be a local folder: {instead}")


def is_permanent(error: BaseException) -> bool:
    """Whether a retry would fail in the same way: a 4xx answer of the server, no credentials, a local disk's fault."""
    for one in causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            return 400 <= status < 500 and status not in _BUSY
        if type(one).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
            return True
    # NotImplementedError is what Composer's stores raise where they lack an operation.
    return isinstance(error, (FileNotFoundError, PermissionError, NotImplementedError))


def reason(error: BaseException) -> str:
    """The storage's own error message, in one line."""
    last = causes(error)[-1]
    return f"{type(last).__name__}: {(str(last).splitlines() or [''])[0]}"


def attempted(work: Callable[[], T], what: str) -> T:
    """The result of ``work``, attempted up to :data:`ATTEMPTS` times; each failure is logged.

    Raises:
        UserError: all attempts failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:  # each storage raises exceptions of its own
            if is_permanent(error) or attempt == ATTEMPTS:
                raise UserError(f"{what} failed ({reason(error)}); check address, credentials and network") from error
            wait = WAIT * 2 ** (attempt - 1)
            log.warning("%s failed (%s), attempt %d of %d; again in %g s", what, reason(error), attempt, ATTEMPTS, wait)
            time.sleep(wait)
    raise AssertionError


class Storage:
    """A folder of an object store.

    Args:
        uri: such as ``s3://bucket/runs/a``.

    Raises:
        UserError: no such kind of storage, no bucket in it, or no credentials.
    """

    def __init__(self, uri: str) -> None:
        from composer.utils import parse_uri

        self.uri = uri.rstrip("/")
        backend, bucket, path = parse_uri(self.uri)
        if backend not in BACKENDS or not bucket:
            raise UserError(f"{uri}: no storage of this kind; give {', '.join(f'{b}://bucket/path' for b in BACKENDS)}")
        self._path, self._store = path.strip("/"), self._open(self.uri)

    @staticmethod
    def _open(uri: str) -> ObjectStore:
        from composer.utils import maybe_create_object_store_from_uri

        try:
            store: Any = maybe_create_object_store_from_uri(uri)
        except Exception as error:
            raise UserError(
                f"{uri} can't be opened ({reason(error)}); check credentials, region and S3_ENDPOINT_URL"
            ) from error
        return store

    def key(self, name: str) -> str:
        """The object's full name in its bucket."""
        return f"{self._path}/{name}" if self._path else name

    def names(self) -> set[str]:
        """Objects in this folder and its subfolders.

        Raises:
            UserError: the bucket can't be listed or is not there, or an object's name leads out of the folder.
        """
        prefix = f"{self._path}/" if self._path else ""
        keys = attempted(lambda: self._store.list_objects(prefix), f"listing {self.uri}")
        names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):  # as a file, it could end up anywhere
                raise UserError(f"{self.uri} is refused: it holds an object named {name!r}; remove that")
        return names

    def download(self, name: str, target: Path) -> bool:
        """Downloads an object atomically; False if there is none. Raises UserError for a lasting failure."""
        target.parent.mkdir(parents=True, exist_ok=True)

        def once() -> bool:
            try:
                self._store.download_object(self.key(name), str(target), overwrite=True)
            except FileNotFoundError:
                return False
            return True

        return attempted(once, f"downloading {self.uri}/{name}")

    def download_all(self, name: str, target: Path, names: set[str]) -> None:
        """Downloads what :meth:`upload` stored under ``name``: an object, or a folder, by ``names``. Raises as :meth:`download`."""
        for one in sorted(names):
            if one == name:
                self.download(one, target)
            elif one.startswith(f"{name}/"):
                self.download(one, target / one.removeprefix(f"{name}/"))

    def text(self, name: str) -> str | None:
        """An object's content; None if there is none. Raises UserError for a lasting failure, and for what isn't text."""
        with tempfile.TemporaryDirectory(prefix="mohd_train-download-") as scratch:
            target = Path(scratch) / "object"
            try:
                return target.read_text(encoding="utf-8") if self.download(name, target) else None
            except UnicodeDecodeError as error:
                raise UserError(f"{self.uri}/{name} is broken ({error}); remove it, or set another folder") from None

    def pointed(self, link: str) -> str:
        """The name in this folder that a link (an object whose content is a key, as Composer writes it) stands for; empty: none."""
        return (self.text(link) or "").strip().rpartition("/")[2]

    def upload(self, name: str, path: Path) -> None:
        """Stores a local file, in place of an object of this name; or the files of a folder, the hidden ones last.

        A sharded checkpoint is complete once its ``.metadata`` is there: an old one is removed before any other file is replaced.

        Raises:
            UserError: a lasting failure.
        """
        if path.is_dir():
            files = sorted(path.iterdir(), key=lambda file: (file.name.startswith("."), file.name))
            for file in files:
                if file.name.startswith("."):
                    self.upload_bytes(f"{name}/{file.name}", b"")
            for file in files:
                self.upload(f"{name}/{file.name}", file)
        else:
            attempted(lambda: self._store.upload_object(self.key(name), str(path)), f"uploading {self.uri}/{name}")

    def upload_bytes(self, name: str, content: bytes) -> None:
        """As :meth:`upload` of a file."""
        with tempfile.NamedTemporaryFile(prefix="mohd_train-upload-") as file:
            file.write(content)
            file.flush()
            self.upload(name, Path(file.name))


def path_or_uri(text: str) -> Path | str:
    """For command lines: a Path would take ``s3://bucket`` for ``s3:/bucket``."""
    return text if is_remote(text) else Path(text).expanduser()


def here(checkpoint: Path | str) -> Path:
    """A local path unchanged; a checkpoint on object storage as a copy, which is removed when this process ends.

    Raises:
        UserError: as :func:`download_checkpoint`.
    """
    if not is_remote(checkpoint):
        return Path(checkpoint)
    scratch = Path(tempfile.mkdtemp(prefix="mohd_train-checkpoint-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return download_checkpoint(str(checkpoint), scratch)


def download_checkpoint(uri: str, folder: Path) -> Path:
    """Downloads a checkpoint of a run's remote ``save_folder`` to ``folder/RUN/checkpoints/NAME``, with its tokenizer and record.

    ``.../latest-rank0.pt`` is the newest.

    Raises:
        UserError: there is none, or the storage can't be reached.
    """
    place, _, name = uri.rpartition("/")
    storage = Storage(place)
    names = storage.names()
    if f"{name}.symlink" in names:
        name = storage.pointed(f"{name}.symlink")
    there = {one.partition("/")[0] for one in names}
    if name not in there:
        found = sorted(one for one in there if one.startswith("ep"))
        raise UserError(f"{uri}: no such checkpoint; {place} has {', '.join(found[-3:]) or 'none'}")
    parts = [part for part in place.split("/") if part]
    run = parts[-2] if parts[-1] == "checkpoints" else parts[-1]
    target = folder / run / "checkpoints" / name
    storage.download_all(name, target, names)
    for other in names:
        if other == "run.json" or other.startswith("tokenizer/"):
            storage.download(other, folder / run / other)
    return target
