"""The newest values of metrics.jsonl, read from its end."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mohd_train.run_folder import metrics
from mohd_train.run_folder.metrics import last_values, lines_backwards


@given(st.lists(st.text(max_size=30), max_size=30), st.integers(1, 64))
def test_lines_backwards_are_the_lines_reversed(words: list[str], block: int) -> None:

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BLOCK", block)
        path = Path(place) / "metrics.jsonl"
        records = [{"n": i, "text": word} for i, word in enumerate(words)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert list(lines_backwards(path)) == records[::-1]


def test_last_values_takes_the_newest_of_each(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1, "b": 1}\n{"a": 2}\n')
    assert last_values(path, ("a", "b", "c")) == {"a": 2, "b": 1}
    assert last_values(tmp_path / "none", ("a",)) == {}
