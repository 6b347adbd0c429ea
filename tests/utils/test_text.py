"""Names from outside become one folder or file, and lead nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.errors import UserError
from mohd_train.utils.text import NAME_BYTES, plain_name


@pytest.mark.parametrize("name", ["355m-x2", "a b", "..a", ".hidden", "é" * 100, "x" * NAME_BYTES, "$(x)", "-n"])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert plain_name(name, "--name") == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../x", "must be a plain name"),
        ("/x", "must be a plain name"),
        ("a\\b", "must be a plain name"),
        ("..", "must be a plain name"),
        ("", "must be a plain name"),
        ("a ", "no space at its ends"),
        ("a\nb", "control characters such as '\\n'"),
        ("a\u2028b", "control characters"),
        ("a\x1b[2J", "control characters"),
        ("\udcff", "control characters"),  # how Python hands on bytes of a command line that are not UTF-8
        ("é" * 101, "of 202 bytes; a name has at most 200"),
    ],
)
def test_other_names_are_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(UserError, match=r"^--name is ") as caught:
        plain_name(name, "--name")
    assert why in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("a.-/\\ \n\0~é"), max_size=6))
def test_what_is_accepted_is_a_child_of_any_folder(name: str) -> None:
    try:
        plain_name(name, "name")
    except UserError:
        return
    path = Path("/results") / name
    assert path.resolve().parent == Path("/results")
    assert path.name == name
