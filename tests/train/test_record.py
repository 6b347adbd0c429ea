"""Whose a run folder is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mohd_train.config.compare import config_differences
from mohd_train.config.schema import Config
from mohd_train.errors import UserError
from mohd_train.run_folder.record import RunRecord, check_folder, read_record
from mohd_train.utils.files import write_json


def config(folder: Path, **values: object) -> Config:
    made = Config(run_folder=str(folder), save_folder=str(folder / "checkpoints"), run_name="r", max_duration="5ba")
    for key, value in values.items():
        setattr(made, key, value)
    return made


def record(folder: Path, made: Config, **values: object) -> RunRecord:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"run_name": "r", "started": "now", "status": "running", "config": dataclasses.asdict(made), "batch": 3}
    found = RunRecord(folder, data | {"data": {"sha256": "d", "folder": "data"}} | values)
    found.update()
    return found


def test_differences_leave_out_what_computes_nothing(tmp_path: Path) -> None:
    one, two = dataclasses.asdict(config(tmp_path)), dataclasses.asdict(config(tmp_path, autoresume=True, seed=5))
    two["loggers"] = {"wandb": {"project": "p"}}
    two["data"]["num_workers"] = 7
    assert config_differences(one, two) == ["seed: 17 there, 5 here"]


def test_new_folder_is_free(tmp_path: Path) -> None:
    assert check_folder(config(tmp_path / "new"), "d") is None


def test_another_run_is_refused_by_name_of_the_key(tmp_path: Path) -> None:
    record(tmp_path, config(tmp_path))
    with pytest.raises(UserError, match=r"holds another run \(max_duration: 5ba there, 9ba here\)"):
        check_folder(config(tmp_path, max_duration="9ba", autoresume=True), "d")
    with pytest.raises(UserError, match=r"other shards"):
        check_folder(config(tmp_path, autoresume=True), "other data")


def test_same_run_needs_a_word_to_go_on(tmp_path: Path) -> None:
    found = record(tmp_path, config(tmp_path))
    with pytest.raises(UserError, match=r"already holds this run \(running, at batch 3\); set autoresume=true"):
        check_folder(config(tmp_path), "d")
    resumed = check_folder(config(tmp_path, autoresume=True), "d")
    assert resumed is not None
    assert resumed.run_id == found.run_id  # W&B goes on in one place
    assert check_folder(config(tmp_path, save_overwrite=True), "d") is None


def test_overwriting_never_eats_the_checkpoint_it_starts_from(tmp_path: Path) -> None:
    record(tmp_path, config(tmp_path))
    loaded = str(tmp_path / "checkpoints" / "ep0-ba3-rank0.pt")
    with pytest.raises(UserError, match="lies in save_folder"):
        check_folder(config(tmp_path, save_overwrite=True, load_path=loaded), "d")


def test_run_that_failed_before_its_first_batch_frees_its_folder(tmp_path: Path) -> None:
    record(tmp_path, config(tmp_path), status="failed", batch=0)
    assert check_folder(config(tmp_path, seed=5), "d") is None
    (tmp_path / "metrics.jsonl").write_text('{"batch": 1}\n')
    with pytest.raises(UserError, match="another run"):
        check_folder(config(tmp_path, seed=5), "d")


def test_folder_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert check_folder(config(tmp_path), "d") is None
    (tmp_path / "checkpoints" / "ep0-ba3-rank0.pt").touch()
    with pytest.raises(UserError, match="of another run"):
        check_folder(config(tmp_path), "d")


def test_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(UserError, match=r"run.json: broken"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="not the record of a run"):
        read_record(tmp_path)


def test_json_is_whole_or_old(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    circular: dict = {}
    circular["self"] = circular
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, circular)
    assert json.loads(path.read_text()) == {"a": 1}
