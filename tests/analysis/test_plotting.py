"""Lines of a figure that can be told apart."""

from __future__ import annotations

from mohd_train.analysis.plotting import STYLES, style


def test_no_two_lines_look_alike() -> None:
    """In black and white too, for as many runs as a sweep has: dashes, mark, and whether that is filled."""
    looks = [style(number) for number in range(len(STYLES) ** 2)]
    seen = {(str(look["linestyle"]), look["marker"], look.get("markerfacecolor")) for look in looks}
    assert len(seen) == len(looks)
