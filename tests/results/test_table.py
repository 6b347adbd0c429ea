"""One table in four forms."""

from __future__ import annotations

import pytest

from mohd_train.results.table import Number, Table


def test_numbers_of_a_csv_stand_alone() -> None:
    table = Table("t", ["a", "b", "c"])
    table.add("one", Number(-0.25, signed=True), Number(10, error=0.5))
    table.add("two", None, Number(2, unfinished=True))
    assert table.to_csv() == "a,b,c,c stderr,unfinished\none,-0.25,10.00,0.50,\ntwo,,2.00,,c\n"
    assert "| one | −0.25 | 10.00 ± 0.50 |" in table.to_markdown()
    assert r"two & -- & 2.00 $\dagger$ \\" in table.to_latex()
    table.stress_least(2)
    assert table.bold == set()  # one finished number: nothing to be the least of


def test_a_label_is_no_formula_for_a_spreadsheet() -> None:
    table = Table("t", ["run", "a"])
    for label in ("=1+1", "+x", "-x2", "@SUM(A1)", "-0.5", "x=1"):
        table.add(label, Number(-1))
    cells = [line.split(",")[0] for line in table.to_csv().splitlines()[1:]]
    assert cells == ["'=1+1", "'+x", "'-x2", "'@SUM(A1)", "-0.5", "x=1"]
    assert all(line.endswith(",-1.00") for line in table.to_csv().splitlines()[1:])


def test_what_a_form_reserves_is_escaped() -> None:
    table = Table("a <b>", ["x & y", "n_1"], [["50% <i>", "1"]], ["#1"])
    assert "&lt;i&gt;" in table.to_html()
    assert r"50\% <i> & 1 \\" in table.to_latex()
    assert r"x \& y & n\_1" in table.to_latex()


@pytest.fixture
def grouped() -> Table:
    """Two groups of columns, two blocks of rows, a footnote, differences."""
    table = Table("t", ["Model", "a", "b", "Mean"], groups=[("", 1), ("G & H", 2), ("", 1)], blocks={0, 2}, minus="-")
    table.add("ours", Number(30, 1, error=0.5), None, Number(40, 1))
    table.add("paper", Number(31, 1), Number(2, 1), Number(41, 1), faint=True)
    table.add("difference", Number(-1.26, 1, signed=True), None, Number(0, 1, signed=True), faint=True)
    table.bold, table.marks = {(0, 1)}, {(0, 1): "a", (0, 0): "a,b"}
    table.notes = ["Plain.", ("a", "why"), ("b", "100% & more")]
    return table


def test_markdown_of_groups_marks_and_differences(grouped: Table) -> None:
    assert grouped.to_markdown().splitlines() == [
        "**t**",
        "",
        "| Model | a | b | Mean |",
        "| --- | ---: | ---: | ---: |",
        "|  | *G & H* |  |  |",
        "| ours <sup>a,b</sup> | **30.0 ± 0.5** <sup>a</sup> | – | 40.0 |",
        "| paper | 31.0 | 2.0 | 41.0 |",
        "| difference | -1.3 | – | +0.0 |",
        "",
        "Plain.  ",
        "<sup>a</sup> why  ",
        "<sup>b</sup> 100% & more",
    ]
    grouped.captioned, grouped.bold_ours = False, True
    text = grouped.to_markdown()
    assert text.startswith("| Model |")
    assert "| **ours** <sup>a,b</sup> |" in text
    assert "| paper |" in text
    grouped.minus = "−"
    assert "| −1.3 |" in grouped.to_markdown()


def test_latex_of_groups_marks_and_differences(grouped: Table) -> None:
    assert grouped.to_latex().splitlines() == [
        "% t",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"& \multicolumn{2}{c}{G \& H} & \\",
        r"Model & a & b & Mean \\",
        r"\midrule",
        r"ours$^{a,b}$ & \textbf{30.0 $\pm$ 0.5}$^{a}$ & -- & 40.0 \\",
        r"paper & 31.0 & 2.0 & 41.0 \\",
        r"\midrule",
        r"difference & $-1.3$ & -- & $+0.0$ \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"Plain.\\",
        r"$^{a}$ why\\",
        r"$^{b}$ 100\% \& more",
    ]


def test_html_and_csv_of_marks_and_differences(grouped: Table) -> None:
    text = grouped.to_html()
    assert "<tr><td>ours (a,b)</td><td><b>30.0 ± 0.5 (a)</b></td><td>–</td><td>40.0</td></tr>" in text
    assert "<tr class=paper><td>difference</td><td>-1.3</td>" in text
    assert "<p class=note>(b) 100% &amp; more</p>" in text
    assert grouped.to_csv().splitlines() == [
        "Model,a,a stderr,b,Mean",
        "ours,30.0,0.5,,40.0",
        "paper,31.0,,2.0,41.0",
        "difference,-1.3,,,+0.0",
    ]
    grouped.records = [["id", "x"], ["o", "1"]]
    assert grouped.to_csv() == "id,x\no,1\n"
