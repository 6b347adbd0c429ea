from __future__ import annotations

from pathlib import Path

import pytest

from mohd_train.storage import path_or_uri
from mohd_train.utils.arguments import Parser


def test_a_path_after_an_equals_sign_is_expanded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = Parser()
    parser.add_argument("--out", type=Path, default=Path("here"))
    parser.add_argument("--checkpoint", type=path_or_uri)
    commands = parser.add_subparsers()
    commands.add_parser("list").add_argument("folder", type=Path)
    found = parser.parse_args(["--out=~/x", "--checkpoint=~/y", "list", "~/z"])
    assert [found.out, found.checkpoint, found.folder] == [Path(f"/home/somebody/{x}") for x in "xyz"]
    assert parser.parse_args(["--checkpoint=s3://a/~/b"]).checkpoint == "s3://a/~/b"
    assert parser.parse_args([]).out == Path("here")


def test_every_parser_is_of_that_kind(root: Path) -> None:
    sources = {file.name: file.read_text(encoding="utf-8") for file in (root / "src").rglob("*.py")}
    assert "class Parser(argparse.ArgumentParser)" in sources["arguments.py"]
    assert [name for name, text in sources.items() if "ArgumentParser(" in text] == []
