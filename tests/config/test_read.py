"""Text stays text, `~` is a home, and a word of a command line is a file or an override."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mohd_train.config.check import PATHS
from mohd_train.config.keys import KNOWN_KEYS, TEXT_KEYS, is_text, value_of
from mohd_train.config.load import load_config, load_model_plan, to_yaml
from mohd_train.config.read import key_parts, read_file, read_override, split_arguments
from mohd_train.errors import UserError

# What YAML 1.1 takes for a number, a truth or a date.
LOOKS_TYPED = ("1.10", "007", "12e4567", "1:30", "on", "No", "0x1F", "1_000", "2026-11-26", ".5", "1e-3", ".inf", "=")


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def at(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("text", LOOKS_TYPED)
def test_every_text_key_keeps_its_text(text: str, tmp_path: Path) -> None:
    """From a file and from the command line; the schema's types decide, so a new key can't be missed."""
    for key in TEXT_KEYS:
        one = is_text(KNOWN_KEYS[key])
        written, expected = (text, text) if one else (f"[{text}, cc]", [text, "cc"])
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(nested(key, "VALUE")).replace("VALUE", written))
        assert at(read_file(str(file)), key) == expected
        assert at(read_override(f"{key}={written}")[0], key) == expected


def test_names_of_domains_are_text(files: list[str], tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text("data: {domains: {1.10: 3, 007: 2, on: 1, null: 4}, optional_domains: [1.10, on]}")
    config = load_config([*files, str(mix)], ["data.domains.007=5"])
    assert config.data.domains == {"1.10": 3.0, "007": 5.0, "on": 1.0, "null": 4.0}
    assert config.data.optional_domains == ["1.10", "on"]
    assert load_config(files, ["data.domains={1.10: 1}"]).data.domains == {"1.10": 1.0}


@pytest.mark.parametrize("name", ["1.10", "007", "12e4567", "1:30", "on"])
def test_a_run_is_called_what_it_was_called(name: str, files: list[str], tmp_path: Path) -> None:
    config = load_config(files, [f"run_name={name}", f"model.name={name}"])
    assert (config.run_name, config.model.name) == (name, name)
    assert config.save_folder == f"runs/{name}/checkpoints"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config([str(again)]) == config
    assert load_model_plan(files[1:], [f"mohd.name={name}"]).name == f"355m-{name}"


def test_null_stays_null_and_quotes_are_quotes(files: list[str], tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("run_name: 1.10\nload_path: 7\n")
    for word in ("run_name=null", "run_name=~", "run_name="):
        assert load_config([*files, str(given)], [word]).run_name == "355m-x2"
    assert load_config(files, ['run_name="null"']).run_name == "null"
    assert load_config(files, ["run_name='1.10'"]).run_name == "1.10"
    assert load_config(files, ["run_name=a #1"]).run_name == "a #1"  # no comment of YAML's
    assert load_config(files, ["run_name=${model.name}-y"]).run_name == "355m-y"
    given.write_text("load_path: null\nsave_keep_every: ~\nrun_name:\n")
    config = load_config([*files, str(given)])
    assert (config.load_path, config.save_keep_every, config.run_name) == (None, None, "355m-x2")


def test_an_anchor_is_read_by_each_key_in_its_way(files: list[str], tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("seed: &x 10\nrun_name: *x\ndata: &d {local: 007}\nmodel: {<<: {name: 1.10}}\n")
    config = load_config([*files, str(given)])
    assert (config.seed, config.run_name, config.data.local, config.model.name) == (10, "10", "007", "1.10")


def test_numbers_of_an_older_yaml_are_not_read_as_others(files: list[str]) -> None:
    assert load_config(files, ["seed=010"]).seed == 10
    with pytest.raises(UserError, match="seed: Value '1:30'"):
        load_config(files, ["seed=1:30"])
    with pytest.raises(UserError, match=r"optimizer\.lr: Value '1:30.5'"):
        load_config(files, ["optimizer.lr=1:30.5"])


def test_an_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("# a comment\n\nrun_name: 1.10\nseed: 1\nseed: 2\n")
    with pytest.raises(UserError, match="broken YAML at line 5: found duplicate key seed"):
        read_file(str(file))


def test_home_is_expanded_in_every_path(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for key in PATHS:
        assert value_of(load_config(files, [f"{key}=~/a/b"]), key) == f"{tmp_path}/home/a/b"
        assert value_of(load_config(files, [f"{key}=./~a"]), key) == "./~a"
        with pytest.raises(UserError, match=rf"{key} is '~no-such-user/x'; there is no such home folder"):
            load_config(files, [f"{key}=~no-such-user/x"])
    assert load_config(files, ["run_folder=~/{run_name}"]).save_folder == f"{tmp_path}/home/355m-x2/checkpoints"
    assert load_config(files, ["save_folder=s3://b/~x"]).save_folder == "s3://b/~x"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "later.yaml").write_text("seed: 3\n")
    assert load_config([*files, "~/later.yaml"]).seed == 3


def test_no_path_of_the_schema_is_forgotten() -> None:
    words = ("folder", "path", "dir", "file", "local", "remote", "cache")
    assert set(PATHS) == {key for key in TEXT_KEYS if any(word in key.rpartition(".")[2] for word in words)}


def test_a_word_is_a_file_or_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=3e-4.yaml", "seed=3.yaml"):
        Path(name).write_text("seed: 3\n")
    Path("a=b").mkdir()
    Path("a=b/c.yaml").write_text("")
    words = ["x.yaml", "lr=3e-4.yaml", "./seed=3.yaml", "a=b/c.yaml", "seed=4", "load_path=x.yaml", "lrr=1"]
    assert split_arguments(words) == (words[:4], words[4:])
    with pytest.raises(
        UserError, match=r"'seed=3.yaml' is a file here, and also sets the key seed; write ./seed=3.yaml"
    ):
        split_arguments(["seed=3.yaml"])
    with pytest.raises(UserError, match=r"lr=4.yaml: no such config file, and no override: there is no key 'lr'"):
        split_arguments(["lr=4.yaml"])
    with pytest.raises(UserError, match=r"a=c/d: no such config file|neither|unknown key 'a'"):
        load_config(*split_arguments(["a=c/d"]))


def test_a_name_with_dots_has_a_way_to_be_written(files: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(files, ["data.domains.v1.5=0.9"])
    assert str(caught.value) == (
        "override 'data.domains.v1.5=0.9': dots separate keys, and data.domains has no keys below its names; for the name "
        "'v1.5' write 'data.domains[v1.5]=0.9'"
    )
    assert load_config(files, ["data.domains[v1.5]=0.9"]).data.domains == {"cc": 3.0, "wiki": 1.0, "v1.5": 0.9}
    assert key_parts("data.domains[v1.5]") == ["data", "domains", "v1.5"]
