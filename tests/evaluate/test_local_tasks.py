"""Local rows give what the stock task gives on the same rows: prompts, choices, scores."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from mohd_train.errors import UserError
from mohd_train.evaluate.tasks import build_task, stock_manager
from mohd_train.results.suite import Suite, load_suite

TASKS = list(load_suite().tasks)
Stock = Callable[[str, Path], Task | Group]


def leaves(item: Task | Group) -> dict[str, Task]:
    tasks = item.get_all_tasks() if isinstance(item, Group) else [item]
    return {task.task_name: task for task in tasks}


def requests_and_scores(task: Task, seed: int) -> list[Any]:
    """Every request as text, and the metrics that made-up answers (a hash of the request) earn."""
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    found: list[Any] = []
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance)
    for doc_id, doc in task.doc_iterator(rank=0, limit=None, world_size=1):
        instances = sorted(by_doc[doc_id], key=lambda instance: instance.idx)
        answers = [(-float(zlib.crc32(repr(i.args).encode()) % 1000), False) for i in instances]
        found.append(
            ([i.args for i in instances], [i.request_type for i in instances], task.process_results(doc, answers))
        )
    return found


def compare(name: str, data_dir: Path, suite: Suite, stock: Stock, cache: Path) -> int:
    spec = suite.tasks[name]
    ours = build_task(spec, stock_manager([spec]), data_dir, cache)
    theirs = leaves(stock(name, data_dir))
    assert leaves(ours.item).keys() == theirs.keys()
    questions = 0
    for task_name, task in leaves(ours.item).items():
        mine, reference = (requests_and_scores(t, suite.seed) for t in (task, theirs[task_name]))
        assert mine == reference, task_name
        questions += len(mine)
        assert task.aggregation().keys() == theirs[task_name].aggregation().keys()
    return questions


@pytest.mark.parametrize("name", TASKS)
def test_demo_rows_equal_the_stock_task(
    name: str, suite: Suite, stock: Stock, demo_questions: Path, tmp_path: Path
) -> None:
    assert compare(name, demo_questions, suite, stock, tmp_path) >= 6


@pytest.mark.real_data
@pytest.mark.parametrize("name", TASKS)
def test_real_rows_equal_the_stock_task(name: str, suite: Suite, stock: Stock, real_data: Path, tmp_path: Path) -> None:
    assert compare(name, real_data / "eval", suite, stock, tmp_path) >= 100


def test_the_demo_has_rows_for_every_task_and_its_shots(suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    manager = stock_manager(suite.select(None))
    for spec in suite.select(None):
        built = build_task(spec, manager, demo_questions, tmp_path)
        assert built.files
        assert all(task.config.num_fewshot == spec.shots for task in built.leaves)
    assert len(built.leaves) == 3
    assert len(built.absent) == 54  # of mmlu's 57 subjects


def test_group_keeps_lm_evals_own_weighting(suite: Suite, demo_questions: Path, tmp_path: Path) -> None:
    spec = suite.tasks["mmlu"]
    group = build_task(spec, stock_manager([spec]), demo_questions, tmp_path).item
    assert isinstance(group, Group)
    assert [(m.metric, m.weight_by_size) for m in group.aggregate_metric_list or []] == [("acc", True)]
    assert {sub.name for sub in group.get_all_groups()} == {"mmlu_stem", "mmlu_other", "mmlu_social_sciences"}


@pytest.fixture
def copied(demo_questions: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_questions, tmp_path / "rows")
    return tmp_path / "rows"


def build(name: str, suite: Suite, data_dir: Path) -> None:
    spec = suite.tasks[name]
    build_task(spec, stock_manager([spec]), data_dir, data_dir.parent)


def edit(path: Path, line: int, **changes: Any) -> None:
    """Changes fields of one row (1 is the first); None removes the field."""
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    for key, value in changes.items():
        rows[line - 1].pop(key) if value is None else rows[line - 1].__setitem__(key, value)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "file", "changes", "message"),
    [
        ("sciq", "test", {"support": None}, "field 'support' is missing"),
        ("sciq", "test", {"question": 7}, "field 'question' is int, must be str"),
        ("piqa", "validation", {"label": 2}, "field 'label' is 2, must be 0 or 1"),
        ("winogrande", "validation", {"sentence": "no blank"}, "field 'sentence' has no blank"),
        ("winogrande", "validation", {"answer": "3"}, "field 'answer' is '3'"),
        ("arc_easy", "test", {"answerKey": "E"}, "field 'answerKey' is 'E', not one of the labels"),
        ("arc_challenge", "train", {"choices": {"text": ["x", "y"], "label": ["A"]}}, "choices.label"),
        ("hellaswag", "validation", {"label": "4"}, "field 'label' is '4', not an index"),
        ("logiqa", "test", {"label": "e"}, "field 'label' is 'e'"),
        ("logiqa", "test", {"options": ["one", "two"]}, "field 'options' must be a list of 4"),
        ("boolq", "train", {"passage": None}, "field 'passage' is missing"),
        ("lambada_openai", "test", {"text": "word"}, "field 'text' must hold a context"),
        ("mmlu/astronomy", "dev", {"answer": 4}, "field 'answer' is 4, must be 0 to 3"),
    ],
)
def test_bad_row_is_named(
    copied: Path, suite: Suite, task: str, file: str, changes: dict[str, Any], message: str
) -> None:
    path = copied / task / f"{file}.jsonl"
    edit(path, 3, **changes)
    with pytest.raises(UserError, match="line 3") as error:
        build(task.partition("/")[0], suite, copied)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_broken_lines_are_named(copied: Path, suite: Suite) -> None:
    path = copied / "sciq" / "test.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b'{"question": \n')
    with pytest.raises(UserError, match="line 9: not valid JSON"):
        build("sciq", suite, copied)
    path.write_bytes(good + b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 9: not UTF-8"):
        build("sciq", suite, copied)
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="holds no rows"):
        build("sciq", suite, copied)


def test_missing_files_are_named(copied: Path, suite: Suite) -> None:
    (copied / "boolq" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file .*train\.jsonl; task boolq takes its 32 shots from it"):
        build("boolq", suite, copied)
    (copied / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"validation\.jsonl; task piqa takes its questions"):
        build("piqa", suite, copied)
    shutil.rmtree(copied / "logiqa")
    with pytest.raises(UserError, match=r"no folder .*logiqa"):
        build("logiqa", suite, copied)


def test_too_few_rows_for_the_shots(copied: Path, suite: Suite) -> None:
    path = copied / "arc_challenge" / "train.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:24]), encoding="utf-8")
    with pytest.raises(UserError, match="holds 24 rows; task arc_challenge draws 25 shots"):
        build("arc_challenge", suite, copied)


def test_unknown_subject_is_named(copied: Path, suite: Suite) -> None:
    (copied / "mmlu" / "astronomy").rename(copied / "mmlu" / "astronomie")
    with pytest.raises(UserError, match=r"no subject 'astronomie' \(did you mean 'astronomy'\?\)"):
        build("mmlu", suite, copied)


def test_hub_rows_that_cannot_be_had_are_named(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    spec = suite.tasks["logiqa"]
    with pytest.raises(
        UserError, match=r"task logiqa are not available .*no longer supported; give them with --data-dir"
    ):
        build_task(spec, stock_manager([spec]), None)
