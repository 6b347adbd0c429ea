"""Text and numbers for people."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

from mohd_train.errors import UserError

NAME_BYTES = 200  # of the 255 that a file name may have: endings and temporary names are added
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, undecodable bytes, separators of lines and paragraphs


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'lr'?)``, or an empty string if nothing comes near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: object) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def short(number: float) -> str:
    """``1234567`` -> ``1.23M``: three digits and a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """``93784`` -> ``1d 02h``: the two largest units."""
    seconds = round(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"


def printable(text: str, what: str) -> str:
    """``text`` unchanged. Raises UserError if it holds a control character, a line break or undecodable bytes."""
    for character in text:
        if unicodedata.category(character) in _UNPRINTABLE:
            raise UserError(f"{what} is {text!r}; it must not hold control characters such as {character!r}")
    return text


def plain_name(name: object, what: str) -> str:
    """``name`` unchanged, if it can name one folder or file: nothing in it leads elsewhere, on any file system.

    To be called wherever a name comes from outside: a command line, a config, a checkpoint, a manifest.

    Args:
        what: where the name comes from, for the error, such as ``--name``.

    Raises:
        UserError: it is not text, is empty, ``.`` or ``..``, has a separator, a control character or a space at an end, or is too
            long.
    """
    if not isinstance(name, str):
        raise UserError(f"{what} is {name!r}; it must be a plain name")
    printable(name, what)
    if name in ("", ".", "..") or "/" in name or "\\" in name or name != name.strip():
        raise UserError(f"{what} is {name!r}; it must be a plain name: no '/', '\\' or '..', no space at its ends")
    if len(name.encode()) > NAME_BYTES:
        raise UserError(f"{what} is {name[:20]!r}... of {len(name.encode())} bytes; a name has at most {NAME_BYTES}")
    return name
