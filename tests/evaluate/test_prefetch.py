"""Rows fetched from a hub of the test's own: the prompts they give, what is kept, refused, resumed and verified."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from mohd_train.errors import UserError
from mohd_train.evaluate.options import EvalOptions
from mohd_train.evaluate.prefetch import prefetch, sources, verify
from mohd_train.evaluate.rows import MANIFEST, read_manifest
from mohd_train.evaluate.run import run_eval
from mohd_train.evaluate.tasks import build_task, stock_manager
from mohd_train.results.suite import Suite

COMMIT, COPY = "c" * 40, "d" * 40
REAL_LOADER = datasets.load_dataset


class FakeHub:
    """The hub's answers, from the demo's rows; what it was asked for stands in ``asked``."""

    def __init__(self, suite: Suite, rows: Path, copies: Path) -> None:
        manager = stock_manager(suite.select(None))
        named = [source for spec in suite.select(None) for source in sources(spec, manager)]
        self.places = {(source.dataset, source.config): rows / source.place for source in named}
        self.copies = copies  # of a script data set: `logiqa/default/test/0000.parquet`
        self.asked: list[str] = []
        self.broken: dict[str, Exception] = {}  # data set -> what it answers
        self.offline = False

    def splits(self, place: Path) -> datasets.DatasetDict:
        """Rows of a place; splits that the demo lacks hold what another one does."""
        found = {
            file.stem: datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])
            for file in sorted(place.glob("*.jsonl"))
        }
        some = next(iter(found.values()))
        return datasets.DatasetDict({split: found.get(split, some) for split in ("train", "validation", "test", "dev")})

    def load_dataset(self, path: str, name: str | None = None, revision: str | None = None, **kw: Any) -> Any:
        if path in ("parquet", "json"):
            return REAL_LOADER(path, name, **{"cache_dir": str(self.copies.parent / "cache"), **kw})
        self.asked.append(path if name is None else f"{path}/{name}")
        assert revision == COMMIT
        if path in self.broken:
            raise self.broken[path]
        if not self.places[path, name].is_dir():
            raise FileNotFoundError(f"no configuration {name} here")
        return self.splits(self.places[path, name])

    def dataset_info(self, dataset: str, revision: str | None = None) -> SimpleNamespace:
        if self.offline:
            raise ConnectionError("no route\nto host")
        if revision is not None and not self.copies.is_dir():
            raise ValueError(f"404: {revision} is no revision of {dataset}")
        return SimpleNamespace(sha=COMMIT if revision is None else COPY)

    def list_repo_files(self, dataset: str, repo_type: str, revision: str) -> list[str]:
        assert (repo_type, revision) == ("dataset", COPY)
        return [path.relative_to(self.copies).as_posix() for path in self.copies.rglob("*.*")]

    def download(self, dataset: str, name: str, repo_type: str, revision: str) -> str:
        return str(self.copies / name)


@pytest.fixture
def hub(suite: Suite, demo_questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(suite, Path(shutil.copytree(demo_questions, tmp_path / "hub")), tmp_path / "copies")
    fake.broken["EleutherAI/logiqa"] = RuntimeError("Dataset scripts are no longer supported, but found logiqa.py")
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def requests(item: Task | Group, seed: int) -> dict[str, list[Any]]:
    found = {}
    for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        found[task.task_name] = [(one.args, one.request_type) for one in task.instances]
    return found


def test_fetched_rows_give_the_prompts_of_the_hub(
    hub: FakeHub, suite: Suite, stock: Callable[[str, Path], Task | Group], demo_questions: Path, tmp_path: Path
) -> None:
    for split, rows in hub.splits(demo_questions / "logiqa").items():
        (hub.copies / "default" / split).mkdir(parents=True)
        rows.to_parquet(hub.copies / "default" / split / "0000.parquet")
    assert prefetch(tmp_path / "rows", suite, []) == 1  # the demo has 3 of mmlu's 57 subjects
    known = read_manifest(tmp_path / "rows")
    assert known is not None
    assert len(known.missing) == 54
    assert known.missing["mmlu/anatomy"] == "cais/mmlu: no configuration anatomy here"
    logiqa = known.files["logiqa/test.jsonl"]
    assert (logiqa.revision, logiqa.conversion, logiqa.config) == (COPY, True, "logiqa")
    boolq = known.files["boolq/validation.jsonl"]
    assert (boolq.dataset, boolq.config, boolq.revision, boolq.split) == (
        "aps/super_glue",
        "boolq",
        COMMIT,
        "validation",
    )
    manager = stock_manager(suite.select(None))
    for name, spec in suite.tasks.items():
        fetched = build_task(spec, manager, tmp_path / "rows", tmp_path / "cache")
        assert requests(fetched.item, suite.seed) == requests(stock(name, demo_questions), suite.seed), name
    problems, remarks = verify(tmp_path / "rows", suite, [])
    assert (problems, len(remarks)) == ([], 54)


def test_goes_on_where_it_stopped_and_names_what_changed(hub: FakeHub, suite: Suite, tmp_path: Path) -> None:
    said: list[str] = []
    names = ["sciq", "piqa", "lambada_openai"]
    hub.broken["baber/piqa"] = ConnectionError("reset\nby peer")
    assert prefetch(tmp_path / "rows", suite, names, said.append) == 1
    assert "[2/3] piqa: – (baber/piqa: reset by peer)" in said
    del hub.broken["baber/piqa"]
    hub.asked.clear()
    assert prefetch(tmp_path / "rows", suite, names, said.append) == 0
    assert hub.asked == ["baber/piqa"]
    assert said[-3:-2] == ["[1/3] sciq: there"]
    assert verify(tmp_path / "rows", suite, ["piqa"]) == ([], [])
    test = tmp_path / "rows" / "sciq" / "test.jsonl"
    whole = test.read_bytes()
    test.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])  # a row is lost: still good JSON
    (tmp_path / "rows" / "piqa" / "train.jsonl").unlink()
    shutil.copy(test, tmp_path / "rows" / "sciq" / "dev.jsonl")
    problems, remarks = verify(tmp_path / "rows", suite, [])
    assert [text.partition("rows/")[2] for text in problems] == [
        "piqa/train.jsonl is missing",
        "sciq/test.jsonl has changed since it was fetched",
        "sciq/dev.jsonl was not fetched into this folder",
    ]
    assert "boolq: not fetched yet" in remarks
    assert prefetch(tmp_path / "rows", suite, names) == 0
    assert test.read_bytes() == whole


def test_what_cannot_be_had_is_named_and_asked_once(hub: FakeHub, suite: Suite, tmp_path: Path) -> None:
    assert prefetch(tmp_path / "rows", suite, ["sciq", "logiqa"]) == 1
    why = (read_manifest(tmp_path / "rows") or pytest.fail("no manifest")).missing["logiqa"]
    assert "found logiqa.py; nor is there a usable Parquet copy (EleutherAI/logiqa: 404: refs/convert" in why
    assert "\n" not in why
    hub.offline = True
    with pytest.raises(
        UserError, match="nothing is available from the hub; the first answer was: cais/mmlu: no route to"
    ):
        prefetch(tmp_path / "none", suite, ["mmlu"])
    assert not any(name.startswith("cais") for name in hub.asked)
    problems, remarks = verify(tmp_path / "none", suite, ["mmlu"])
    assert (len(problems), len(remarks)) == (1, 57)  # nothing there is not "every file is intact"


def test_rows_that_the_task_cannot_use_are_not_kept(hub: FakeHub, suite: Suite, tmp_path: Path) -> None:
    path = tmp_path / "hub" / "winogrande" / "validation.jsonl"
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": ""'))
    assert prefetch(tmp_path / "rows", suite, ["winogrande", "sciq"]) == 1
    assert not (tmp_path / "rows" / "winogrande" / "validation.jsonl").exists()
    (problem,), (remark,) = verify(tmp_path / "rows", suite, ["winogrande"])
    assert "field 'answer' is ''" in remark
    assert [path.name for path in (tmp_path / "rows" / "winogrande").iterdir()] == []
    assert problem.endswith("holds no rows of winogrande")


def test_rows_of_a_user_are_never_replaced(hub: FakeHub, suite: Suite, tmp_path: Path) -> None:
    mine = tmp_path / "rows" / "sciq" / "test.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}\n")
    with pytest.raises(UserError, match=r"test\.jsonl exists, was not fetched into this folder"):
        prefetch(tmp_path / "rows", suite, ["sciq"])
    assert mine.read_text() == "{}\n"
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        verify(tmp_path / "hub", suite, [])
    (tmp_path / "rows" / MANIFEST).write_text('{"files": ')
    with pytest.raises(UserError, match=r"is not a manifest of mohd prefetch"):
        prefetch(tmp_path / "rows", suite, ["sciq"])


def test_a_task_that_was_not_had_is_a_dash_where_there_is_no_network(
    hub: FakeHub, suite: Suite, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefetch(tmp_path / "rows", suite, ["lambada_openai", "logiqa"])
    names = ["lambada_openai", "logiqa"]
    assert run_eval(EvalOptions(llama, tmp_path / "out", names, tmp_path / "rows", device="cpu"), suite) == 1
    assert "logiqa: – (EleutherAI/logiqa: Dataset scripts are no longer supported" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no folder .*sciq"):  # never fetched: an error, as with any folder
        run_eval(EvalOptions(llama, tmp_path / "out", ["sciq"], tmp_path / "rows", device="cpu"), suite)


def test_command_line(hub: FakeHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["prefetch.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "eval" / "prefetch.py"), run_name="__main__")
        return int(ended.value.code or 0)  # type: ignore[arg-type]

    assert call(tmp_path / "rows", "--tasks", "sciq,piqa") == 0
    assert call(tmp_path / "rows", "--verify") == 0
    (tmp_path / "rows" / "sciq" / "test.jsonl").write_text("{}\n")
    assert call(tmp_path / "rows", "--verify", "--tasks", "piqa") == 0
    assert call(tmp_path / "rows", "--verify") == 1
    assert call(tmp_path / "rows", "--tasks", "scic") == 1
    assert call() == 2
