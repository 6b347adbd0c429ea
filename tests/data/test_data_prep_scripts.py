"""The two commands: what they print, and with which code they exit."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
from data.conftest import SEQ_LEN

from mohd_train.data.manifest import Manifest


def run(root: Path, monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(root / "data_prep" / script), run_name="__main__")
    return int(exited.value.code or 0)


def test_prepare_then_verify(
    root: Path,
    raw: Path,
    pieces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--tokenizer", str(pieces), "--seq-len", str(SEQ_LEN), "--workers", "1"]
    arguments += ["--val-tokens", "500", "--domains", "wiki", "cc"]
    assert run(root, monkeypatch, "prepare.py", "--raw", str(raw), *arguments) == 0
    printed = capsys.readouterr()
    assert f"done: {out}" in printed.out
    assert "docs/s" in printed.err
    monkeypatch.setenv("RED_PAJAMA_DATA_DIR", str(raw))
    assert run(root, monkeypatch, "prepare.py", *arguments) == 0
    assert f"already done: {out}" in capsys.readouterr().out
    assert run(root, monkeypatch, "verify.py", str(out)) == 0
    assert f"sound: {out}" in capsys.readouterr().out
    shard = out / "cc" / "train" / "shard.00000.mds.zstd"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(root, monkeypatch, "verify.py", str(out), "--quick") == 1
    assert str(shard) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "o", "--tokenizer", "t", "--seq-len", "many", "--raw", "r"], 2, "--seq-len"),
        (["--raw", "nowhere", "--out", "o", "--tokenizer", "t"], 1, "error: no raw data folder nowhere"),
        (
            ["--raw", "RAW", "--out", "o", "--tokenizer", "/nowhere.model"],
            1,
            "error: tokenizer /nowhere.model can't be loaded",
        ),
        (["--raw", "RAW", "--out", "o", "--tokenizer", "PIECES", "--domains", "x"], 1, "error: --domains:"),
        (["--raw", "RAW", "--out", "PIECES", "--tokenizer", "PIECES"], 1, "is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line(
    root: Path,
    raw: Path,
    pieces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [{"RAW": str(raw), "PIECES": str(pieces)}.get(argument, argument) for argument in arguments]
    assert run(root, monkeypatch, "prepare.py", *given) == code
    errors = capsys.readouterr().err
    assert message in errors
    if code == 1:
        assert len(errors.strip().splitlines()) == 1


def test_verify_refuses_what_is_not_prepared_data(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, monkeypatch, "verify.py", str(tmp_path)) == 1
    assert "holds no manifest.json" in capsys.readouterr().err


def test_verify_names_damage(
    root: Path,
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(prepared[0], tmp_path / "copy"))
    (copy / "notes" / "val" / "shard.00000.mds.zstd").unlink()
    assert run(root, monkeypatch, "verify.py", str(copy)) == 1
    assert "notes/val/shard.00000.mds.zstd: missing" in capsys.readouterr().out
