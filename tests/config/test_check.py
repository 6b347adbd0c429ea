"""Names that become folders, and a run folder that was moved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mohd_train.config.check import RESERVED_DOMAINS
from mohd_train.config.compare import config_differences
from mohd_train.config.load import load_config, to_yaml
from mohd_train.data import manifest
from mohd_train.errors import UserError
from mohd_train.run_folder.paths import CONFIG, RECORD

NAMES = [
    ("k{rank}k", "run_name is 'k{rank}k': unknown placeholder 'rank'; known: none"),
    ("{epoch}", "run_name is '{epoch}': unknown placeholder 'epoch'"),
    ("{run_name}", "run_name is '{run_name}': unknown placeholder 'run_name'"),
    ("a}b", "run_name is 'a}b': it must not hold '}'"),
    ("x" * 300, "run_name is 'xxxxxxxxxxxxxxxxxxxx'... of 300 bytes; a name has at most 200"),
    ("é" * 150, "of 300 bytes; a name has at most 200"),
    ('"a\\nb"', "must not hold control characters such as '\\n'"),
    ('"a\\0"', "must not hold control characters"),
    ("..", "run_name is '..'; it must be a plain name"),
    ("../x", "a part is '..'; it must be a plain name"),
    ("a/../../x", "a part is '..'; it must be a plain name"),
    ("/x", "a part is ''; it must be a plain name"),
    ("a\\b", "must be a plain name"),
    ('" a"', "no space at its ends"),
]


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_run_names_that_lead_elsewhere_are_refused(name: str, message: str, files: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(files, [f"run_name={name}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    for key in ("model.name", "mohd.name"):
        if "{" not in name and "}" not in name:
            with pytest.raises(UserError, match=key):
                load_config(files, [f"{key}={name}"])


def test_names_may_be_nested_and_of_any_script(files: list[str]) -> None:
    assert load_config(files, ["run_name=été/x2 [1]"]).run_folder == "runs/été/x2 [1]"
    with pytest.raises(UserError, match=r"model\.name is 'a/b'; it must be a plain name"):
        load_config(files, ["model.name=a/b"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("save_folder=ck/{rank}", "save_folder is 'ck/{rank}': unknown placeholder 'rank'; known: {run_name}, {run_folder}"),
        ("save_folder=ck/{{rank}}", "save_folder is 'ck/{{rank}}': it must not hold '{'"),
        ("run_folder=r/{run_name.__class__}", "run_folder is 'r/{run_name.__class__}': unknown placeholder 'run_name'"),
        ("run_folder=r/{}", "run_folder is 'r/{}': it must not hold '{}'; known: {run_name}"),
        ("load_path=a/latest-rank{rank}.pt", "load_path is 'a/latest-rank{rank}.pt': unknown placeholder 'rank'"),
        (f"data.local=a/{'x' * 300}", "data.local has a part of more than 255 bytes"),
        ('data.local="a\\tb"', "data.local is 'a\\tb'; it must not hold control characters"),
        ('run_folder=""', "run_folder is ''; it must be a path"),
    ],
)  # fmt: skip
def test_paths_hold_no_braces_of_composer(override: str, message: str, files: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(files, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [*RESERVED_DOMAINS, ".work", "a/b", "..", "a\\b", "", " a", "x" * 300])
def test_domains_that_collide_or_lead_elsewhere_are_refused(name: str, files: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.domains.* (is a reserved name|must be a plain name|at most 200)"):
        load_config(files, [f"data.domains={json.dumps({name: 1})}"])


def test_what_lies_in_a_data_folder_is_reserved() -> None:
    assert {manifest.MANIFEST, manifest.TOKENIZER_FOLDER, manifest.BAD_ROWS} <= set(RESERVED_DOMAINS)


@pytest.fixture
def run(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run in ``runs/a``: what a session writes before it trains."""
    monkeypatch.chdir(tmp_path)
    config = load_config(files, ["run_name=a"])
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(to_yaml(config))
    (folder / RECORD).write_text(json.dumps({"config": dataclasses.asdict(config)}))
    return folder


def test_the_config_of_a_moved_run_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start anew in the old place."""
    assert "save_folder: '{run_folder}/checkpoints'" in (run / CONFIG).read_text()
    config = load_config(["runs/a/config.yaml"])
    assert load_config([str(run / CONFIG)]) == config
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere" / "b")
    for path in ("elsewhere/b/config.yaml", str(moved / CONFIG)):
        with pytest.raises(UserError) as caught:
            load_config([path], ["autoresume=true"])
        assert str(caught.value) == (
            f"{path} belongs to a run, but its run_folder is runs/a: the run was moved or copied, or was started from "
            f"another folder; add run_folder={Path(path).parent} to resume it"
        )
    there = load_config(["elsewhere/b/config.yaml"], ["run_folder=elsewhere/b"])
    assert there.save_folder == "elsewhere/b/checkpoints"
    record = json.loads((moved / RECORD).read_text())["config"]
    assert config_differences(record, dataclasses.asdict(there)) == []
    other = load_config(
        ["elsewhere/b/config.yaml"], ["run_folder=runs/new", "run_name=new"]
    )  # another run from its config
    assert other.save_folder == "runs/new/checkpoints"
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"add run_folder=b to resume it"):
        load_config(["b/config.yaml"])


def test_the_config_of_an_earlier_version_follows_too(run: Path, tmp_path: Path) -> None:
    """It wrote ``save_folder`` out."""
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace("'{run_folder}/checkpoints'", "runs/a/checkpoints"))
    assert load_config(["runs/a/config.yaml"]).save_folder == "runs/a/checkpoints"
    moved = run.rename(tmp_path / "b")
    assert load_config([str(moved / CONFIG)], [f"run_folder={moved}"]).save_folder == f"{moved}/checkpoints"


SAVE_FOLDERS = ["{run_folder}/checkpoints", "{run_folder}/x/y", "ck/{run_name}", "s3://b/{run_name}"]


@pytest.mark.parametrize("save_folder", SAVE_FOLDERS)
def test_a_config_reads_back_equal_wherever_it_saves(save_folder: str, files: list[str], tmp_path: Path) -> None:
    config = load_config(files, [f"save_folder={save_folder}", "run_folder=~/runs/{run_name}"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config([str(again)]) == config
