"""The page of a sweep."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from support.sweep_results import make_sweep

from mohd_train.results.report import write_report

TABLE4 = {"x2": 10.0, "x2-no-shared": 11.0, "x2-no-balance": 10.5, "x2-no-fusion": 10.25, "dense": 12.0}


class Page(HTMLParser):
    """Counts elements, and refuses a page that is not closed in order."""

    void = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "table4", lambda setting, seed: TABLE4.get(setting))
    path = write_report(folder.path)
    assert path == folder.path / "report.html"
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert (folder.path / "figures" / "load_tiny-355m-x2-s1.png").exists()
    assert not (folder.path / "figures" / "load_tiny-355m-dense-s1.png").exists()
    assert page.seen.count("img") >= 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text.replace("https://www.w3.org", "")
    for words in ("abacus", "+0.17", "prefers-color-scheme: dark", "x2-no-scaling", "1,", "device hours in total"):
        assert words in text
    # 300 batches / 3000 per hour on 2 devices, five runs
    assert "1 device hours in total" in text
