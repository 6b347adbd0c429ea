"""What a path is: every kind, every link to it, and what is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.native import save_native, save_sharded
from support.plans import small_plan
from support.s3_server import BUCKET, S3Server

from mohd_train import checkpoint
from mohd_train.errors import UserError
from mohd_train.hf.convert import load_model
from mohd_train.hf.export import export
from mohd_train.model.llama import Transformer

KINDS = ("file", "sharded", "hf")


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], tuple[Path, Transformer]]:
    """``make(kind)`` -> a checkpoint of that kind, and the model that it holds."""

    def make(kind: str) -> tuple[Path, Transformer]:
        plan = small_plan("x2")
        model = Transformer(plan, seed=3)
        path = (save_sharded if kind == "sharded" else save_native)(tmp_path / "run", plan, model)
        if kind != "hf":
            return path, model
        export(path, tmp_path / "exported")
        return tmp_path / "exported", model

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_says_what_it_is_and_gives_its_tensors(
    make: Callable[[str], tuple[Path, Transformer]], kind: str
) -> None:
    path, model = make(kind)
    found = checkpoint.open(path)
    assert (found.kind, checkpoint.kind_of(path), found.is_native) == (kind, kind, kind != "hf")
    assert (found.path, found.source) == (path, str(path))
    state = model.state_dict()
    weights = {name.removeprefix("transformer."): weight for name, weight in found.tensors().items()}
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert {weight.device.type for weight in found.tensors(meta=True).values()} == {"meta"}
    assert {name: w.shape for name, w in found.tensors(meta=True).items()} == {
        name: w.shape for name, w in found.tensors().items()
    }
    assert found.tokenizer_sha256.startswith("v2:")
    assert (found.tokenizer_folder / "tokenizer.json").is_file()
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    if kind == "hf":
        assert (found.plan, found.metadata["model_type"]) == (None, "mohd")
        with pytest.raises(UserError, match="is a Hugging Face folder; give a checkpoint"):
            checkpoint.open_native(path)
    else:
        assert (found.plan, found.metadata["run_name"], found.run_folder.name) == (model.plan, "test", "run")
        assert checkpoint.open_native(path) == found


@pytest.mark.parametrize("kind", ["file", "sharded"])
@pytest.mark.parametrize("link", ["symbolic", "symbolic, relative", "text", "text, asked by its name", "flattened"])
def test_links(make: Callable[[str], tuple[Path, Transformer]], kind: str, link: str) -> None:
    """Composer's symbolic link; its text file of object storage, in a copied folder; a symbolic link that an archive flattened."""
    path, _ = make(kind)
    latest = path.with_name("latest-rank0.pt")
    if link.startswith("symbolic"):
        latest.symlink_to(path.name if "relative" in link else path)
    elif link == "flattened":
        latest.write_text(path.name)
    else:
        latest.with_name("latest-rank0.pt.symlink").write_text(f"runs/stored/{path.name}")
        latest = latest.with_name("latest-rank0.pt.symlink") if "name" in link else latest
    assert checkpoint.exists(latest)
    assert checkpoint.kind_of(latest) == kind
    assert checkpoint.resolve(latest) == path
    found = checkpoint.open(latest)
    assert (found.path, found.source) == (path, str(path))


def test_links_that_point_nowhere(make: Callable[[str], tuple[Path, Transformer]]) -> None:
    path, _ = make("file")
    latest, text = path.with_name("latest-rank0.pt"), path.with_name("latest-rank0.pt.symlink")
    latest.symlink_to("ep0-ba9-rank0.pt")
    assert checkpoint.exists(latest)
    with pytest.raises(UserError, match=r"latest-rank0.pt points to ep0-ba9-rank0.pt, which is not there"):
        checkpoint.open(latest)
    latest.unlink()
    for content, named in (("runs/a/ep0-ba9-rank0.pt", "ep0-ba9-rank0.pt"), ("", "no checkpoint")):
        text.write_text(content)
        with pytest.raises(UserError, match=rf"symlink points to {named}, which is not there"):
            checkpoint.open(latest)
    text.unlink()
    assert not checkpoint.exists(latest)
    latest.write_text("not a name here")
    with pytest.raises(UserError, match=r"latest-rank0.pt is broken or half-written"):
        checkpoint.open(latest)


def test_a_copy_that_followed_the_link(make: Callable[[str], tuple[Path, Transformer]], tmp_path: Path) -> None:
    """`cp -rL`: latest-rank0.pt is a folder then."""
    path, _ = make("sharded")
    copied = Path(shutil.copytree(path, tmp_path / "copied" / "checkpoints" / "latest-rank0.pt"))
    assert (checkpoint.open(copied).kind, checkpoint.open(copied).path) == ("sharded", copied)


def test_what_is_no_checkpoint(make: Callable[[str], tuple[Path, Transformer]], tmp_path: Path) -> None:
    path, _ = make("sharded")
    for folder in (path.parent, path.parent.parent, tmp_path):
        with pytest.raises(UserError, match=r"is a folder without config\.json.*such as checkpoints/latest-rank0\.pt"):
            checkpoint.open(folder)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.open(tmp_path / "nothing.pt")
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a checkpoint of a known kind"):
        checkpoint.open(tmp_path / "weights.npz")
    (path / ".metadata").unlink()
    with pytest.raises(UserError, match="is broken or half-written"):
        checkpoint.open(path)
    assert checkpoint.kind_of(path) == "sharded"
    (tmp_path / "hf").mkdir()
    for config, message in (("{", "is not valid JSON"), ("[]", "is not a model's configuration"), ("{}", "no weights")):
        (tmp_path / "hf" / "config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            checkpoint.open(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model\.safetensors can't be read"):
        checkpoint.open(tmp_path / "hf").tensors()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_on_object_storage(
    make: Callable[[str], tuple[Path, Transformer]], s3: S3Server, kind: str, tmp_path: Path
) -> None:
    path, model = make(kind)
    client, top = s3.client(), path.parent.parent if kind != "hf" else path.parent
    for file in (file for file in sorted(top.rglob("*")) if file.is_file()):
        client.put_object(Bucket=BUCKET, Key=f"runs/{file.relative_to(top)}", Body=file.read_bytes())
    place = f"s3://{BUCKET}/runs/{path.parent.relative_to(top)}".removesuffix("/.")
    assert checkpoint.exists(f"{place}/{path.name}")
    found = checkpoint.open(f"{place}/{path.name}")
    assert (found.kind, found.source) == (kind, f"{place}/{path.name}")
    assert found.fingerprint == checkpoint.open(path).fingerprint
    again = load_model(found)
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    if kind != "hf":
        client.put_object(Bucket=BUCKET, Key="runs/checkpoints/latest-rank0.pt.symlink", Body=path.name.encode())
        assert checkpoint.open(f"{place}/latest-rank0.pt").path.name == path.name


def test_only_one_place_asks_what_a_path_is(root: Path) -> None:
    """Outside checkpoint/ nothing looks for the files by which a kind is told."""
    source = root / "src" / "mohd_train"
    marks = ('"config.json"', ".distcp", "is_zipfile", "is_sharded(path")
    asking = {
        os.path.relpath(file, source): mark
        for file in source.rglob("*.py")
        for mark in marks
        if mark in file.read_text(encoding="utf-8") and file.parent.name != "checkpoint"
    }
    assert asking.keys() <= {"train/saver.py"}, asking  # which writes the parts
