"""The benchmark on the tiny model: its JSON, its error messages, and that a wrong backend is not timed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mohd_train.benchmark import peers
from mohd_train.benchmark.run import main
from mohd_train.cli.benchmark import add_arguments
from mohd_train.errors import UserError
from mohd_train.kernels import fusion
from mohd_train.kernels.grouped import sorted_spans


def run(root: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    fixed = ["--device", "cpu", "--rounds", "2", "--no-compile", "--tokens", "32"]
    return main(parser.parse_args([*fixed, *words]))


@pytest.mark.parametrize("mode", ["layer", "train", "forward", "decode", "projections"])
def test_rows_of_every_mode(mode: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert run(root, "--models", "tiny:dense,tiny:x2", "--mode", mode, "--json", str(file)) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {"command", "commit", "torch", "device", "dtype", "peak_tflops"} <= set(result["environment"])
    dense, x2 = result["rows"]
    assert (dense["model"], x2["model"], x2["baseline"]) == ("tiny:dense", "tiny:x2", "tiny:dense")
    assert dense["ratio_min"] == dense["ratio_median"] == dense["arithmetic_ratio"] == 1
    assert 0 < x2["ratio_min"] <= x2["ratio_median"]
    assert x2["arithmetic_ratio"] > 1
    assert x2["error_against_reference"] < 1e-4
    assert (x2["activation_bytes"] is not None) == (mode in ("layer", "train"))


@pytest.mark.parametrize("mode", ["layer", "train", "decode"])
def test_transformers_models_beside_ours(mode: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    names = ["tiny:hf-llama", "tiny:moe-x2", "tiny:hf-mixtral-x2"]
    assert run(root, "--models", ",".join(names), "--mode", mode, "--json", str(file)) == 0
    dense, llama, ours, mixtral = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in (dense, llama, ours, mixtral)] == ["tiny:dense", *names]
    assert llama["error_against_reference"] < 1e-4  # it has our dense model's weights
    assert llama["arithmetic_ratio"] == 1
    assert mixtral["arithmetic_ratio"] == ours["arithmetic_ratio"] > 1
    assert (llama["backend"], ours["backend"], mixtral["backend"]) == ("eager", "grouped", "eager")


@pytest.mark.parametrize("mode", ["layer", "train"])
def test_litgpts_model_beside_ours(mode: str, root: Path, tmp_path: Path) -> None:
    """Where ``make benchmark-peers`` has installed it: it has our weights, and gives our dense model's output."""
    pytest.importorskip("litgpt")
    file = tmp_path / "out.json"
    assert run(root, "--models", "tiny:litgpt", "--mode", mode, "--json", str(file)) == 0
    peer = json.loads(file.read_text(encoding="utf-8"))["rows"][1]
    assert (peer["model"], peer["arithmetic_ratio"]) == ("tiny:litgpt", 1)
    assert peer["error_against_reference"] < 1e-4


def test_a_peer_that_is_not_installed_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litgpt.config", None)
    with pytest.raises(UserError, match=r"litgpt can't be imported .*make benchmark-peers installs it"):
        run(root, "--models", "tiny:litgpt", "--mode", "layer")
    with pytest.raises(UserError, match="the modes of litgpt are layer, train"):
        run(root, "--models", "tiny:litgpt", "--mode", "decode")


def test_a_llama_that_computes_something_else_is_not_timed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_ours = peers._as_ours

    def other(module: torch.nn.Module, *rest: Any) -> None:
        as_ours(module, *rest)
        with torch.no_grad():
            next(module.parameters()).mul_(1.1)

    monkeypatch.setattr(peers, "_as_ours", other)
    with pytest.raises(UserError, match="tiny:hf-llama: its output differs from our dense model's"):
        run(root, "--models", "tiny:hf-llama", "--mode", "layer")


def test_a_measured_peak_is_measured_again_after_the_rounds(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One taken while the machine was busy showed an MFU of 125%."""
    found = iter([1e9, 4e9])
    monkeypatch.setattr("mohd_train.benchmark.measure._fastest_product", lambda workload: next(found))
    file = tmp_path / "out.json"
    run(root, "--models", "tiny:x2", "--mode", "layer", "--json", str(file))
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["environment"]["peak_tflops"] == 4e-3
    row = result["rows"][0]
    run(root, "--models", "tiny:x2", "--mode", "layer", "--json", str(file), "--peak-tflops", "0.004")
    given = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
    assert row["mfu"] * row["seconds_min"] == pytest.approx(given["mfu"] * given["seconds_min"])


def test_sweep_gives_a_row_a_point(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    run(root, "--models", "tiny:x2", "--sweep", "tokens=16,32", "--json", str(file))
    shown = capsys.readouterr().out
    assert all(f"tiny:x2 tokens={size}" in shown for size in (16, 32))
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["sweep"], row["tokens"]) for row in rows if row["model"] == "tiny:x2"] == [
        ("tokens=16", 16),
        ("tokens=32", 32),
    ]


def test_no_figure_for_a_backend_that_is_wrong(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sorted_spans.down
    monkeypatch.setattr(sorted_spans, "down", lambda *inputs: right(*inputs) * 1.01)
    with pytest.raises(UserError, match="tiny:x2: backend differs from the reference"):
        run(root, "--models", "tiny:x2", "--mode", "decode")
    assert "tiny:x2" not in capsys.readouterr().out


def test_a_constant_of_the_kernels_can_be_swept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its value while its point is measured, and its own afterwards."""
    seen, before = [], fusion.BLOCK_ELEMENTS
    monkeypatch.setattr(fusion, "_fuse_blocks", _noting(seen, fusion._fuse_blocks))
    run(
        root, "--models", "tiny:x2", "--sweep", "fusion.BLOCK_ELEMENTS=4096,8192", "--json", str(tmp_path / "rows.json")
    )
    assert set(seen) == {4096, 8192}
    assert before == fusion.BLOCK_ELEMENTS
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["sweep"] for row in rows[1::2]] == ["fusion.BLOCK_ELEMENTS=4096", "fusion.BLOCK_ELEMENTS=8192"]


def _noting(seen: list[int], function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        seen.append(fusion.BLOCK_ELEMENTS)
        return function(*arguments)

    return noted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "tiny:x9"], "x9.yaml"),
        (["--models", "huge:x2"], "huge.yaml"),
        (["--sweep", "width=1"], "--sweep"),
        (["--sweep", "fusion.NOTHING=1"], "--sweep"),
        (["--tokens", "30", "--seq-len", "16"], "not a multiple"),
        (["--models", "tiny:x2", "--kernels", "triton"], "use kernels: grouped"),
    ],
)
def test_bad_input(words: list[str], message: str, root: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(root, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(root: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        run(root, "--device", "cuda")
