"""A small corpus out of the text that a Python installation carries, as RedPajama-style rows.

Three domains: ``code`` (sources of the standard library), ``manual`` (its documentation: the topics of ``help()`` and
docstrings) and ``readme`` (descriptions and licences of the installed packages). The same installation gives the
same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mohd_train.errors import UserError
from mohd_train.utils.files import write_atomic, write_json

INDEX = "corpus.json"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
LARGEST_DOCUMENT = 100_000  # bytes; larger sources are tables (unicode data, topics), not code
SMALLEST_DOCUMENT = 200  # bytes
DOMAIN_BYTES = 4_000_000  # at most, a domain

Documents = Iterator[tuple[str, str]]  # (where it comes from, text)


def _sources() -> Iterator[tuple[str, str]]:
    """Every module of the standard library: (path below its folder, text), in the order of the paths."""
    top = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("config-"))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py" and path.stat().st_size <= LARGEST_DOCUMENT:
                try:
                    yield path.relative_to(top).as_posix(), path.read_text(encoding="utf-8")
                except UnicodeDecodeError:  # a few modules keep another encoding on purpose
                    continue


def _docstrings(source: str) -> str:
    """The module's, classes' and functions' docstrings of some length, under their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates that only look like modules
            return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SMALLEST_DOCUMENT:
                parts.append(f"{node.name}\n\n{text}" if not isinstance(node, ast.Module) else text)
    return "\n\n\n".join(parts)


def _manual() -> Documents:
    from pydoc_data.topics import topics  # carried by every CPython

    for topic, text in sorted(topics.items()):
        yield f"help({topic!r})", text
    for path, source in _sources():
        yield f"docstrings of {path}", _docstrings(source)


def _readme() -> Documents:
    found: dict[str, str] = {}
    for package in metadata.distributions():
        name = (package.metadata["Name"] or "").lower()
        if name == "mohd_train":  # otherwise the corpus would change with this project's README
            continue
        body = package.metadata.get_payload()  # type: ignore[attr-defined]  # an email.message.Message
        found[f"description of {name} {package.version}"] = str(body)
        for file in package.files or []:
            if file.name.upper().startswith(("LICENSE", "COPYING", "NOTICE", "AUTHORS")) and ".dist-info" in str(file):
                path = Path(str(package.locate_file(file)))
                if path.is_file():
                    found[f"{file.name} of {name} {package.version}"] = path.read_text("utf-8", errors="replace")
    yield from sorted(found.items())


DOMAINS: dict[str, Callable[[], Documents]] = {"code": _sources, "manual": _manual, "readme": _readme}


def _rows(documents: Documents, domain: str, limit: int) -> list[str]:
    """JSON lines of at most ``limit`` bytes of text, in an order that spreads any prefix over the whole.

    Duplicate texts (licences, mostly) and those outside the size limits are left out.
    """
    kept: dict[str, tuple[str, str]] = {}
    for where, text in documents:
        if SMALLEST_DOCUMENT <= len(text.encode()) <= LARGEST_DOCUMENT:
            kept.setdefault(hashlib.sha256(text.encode()).hexdigest(), (where, text))
    rows, size = [], 0
    for _, (where, text) in sorted(kept.items()):
        size += len(text.encode())
        if size > limit:
            break
        rows.append(
            json.dumps({"text": text, "meta": {"source": where}, "red_pajama_subset": domain}, ensure_ascii=False)
        )
    return rows


def build_corpus(folder: Path, *, domain_bytes: int = DOMAIN_BYTES) -> dict[str, dict[str, Any]]:
    """Writes ``folder/<domain>/<domain>.jsonl`` for every domain, and an index of them last.

    Args:
        folder: created if missing; files of an earlier call are replaced.
        domain_bytes: at most this much text in each domain.

    Returns:
        domain -> ``{"documents", "bytes", "sha256"}`` of its file, as :func:`read_corpus` gives.

    Raises:
        UserError: this Python lacks the sources of its standard library (a stripped installation).
    """
    index: dict[str, dict[str, Any]] = {}
    for domain, documents in DOMAINS.items():
        rows = _rows(documents(), domain, domain_bytes)
        if not rows:
            raise UserError(
                f"this Python ({sysconfig.get_path('stdlib')}) has no text for the domain {domain!r}; "
                "use a full installation, or give your own text with RAW=..."
            )
        text = "\n".join(rows) + "\n"
        write_atomic(folder / domain / f"{domain}.jsonl", text)
        data = text.encode()
        index[domain] = {"documents": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(folder / INDEX, index)
    return index


def read_corpus(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The index of a corpus that :func:`build_corpus` finished, or None if any file is missing or differs from it."""
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        for domain, entry in index.items():
            data = (folder / domain / f"{domain}.jsonl").read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, or not ours: it is rebuilt
        return None
    return index
