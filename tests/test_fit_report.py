"""The report: a page that stands alone, well-formed, with the run's own numbers."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import petiole as pt
from petiole.train.job import FitResult
from petiole.train.report import COLUMNS, Entry, write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

HISTORY = [
    {"epoch": 1, "loss": 1.5, "lr": 1e-3, "val_accuracy": 0.25},
    {"epoch": 2, "loss": 0.5, "lr": 1e-4, "val_accuracy": 0.75},
]
METRICS = {
    "trained_parameters": 12345, "val_accuracy": 0.7512, "test_accuracy": 0.6789, "last_val_accuracy": 0.5,
    "last_test_accuracy": 0.4321, "best_epoch": 2, "seconds": 61.4,
}  # fmt: skip
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every tag that opens closes in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def report(folder: Path, *entries: Entry, title: str = "A title", text: str = "A text") -> str:
    write_report(folder / "report.html", title, text, entries)
    return (folder / "report.html").read_text(encoding="utf8")


def entry(name: str = "FacT", metrics: dict[str, float] = METRICS) -> Entry:
    return Entry(name, FitResult(metrics, HISTORY), 4321)


def test_table_holds_the_results_numbers(tmp_path: Path) -> None:
    page = Page(report(tmp_path, entry()))
    assert page.rows == [list(COLUMNS), ["FacT", "67.9%", "75.1%", "43.2%", "2", "12,345", "4,321", "61"]]


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    metrics = {"trained_parameters": 1, "best_epoch": 2, "seconds": 0.2}
    assert Page(report(tmp_path, entry(metrics=metrics))).rows[1][1:4] == ["-", "-", "-"]


def test_one_run_has_curves_and_several_also_sizes(tmp_path: Path) -> None:
    assert Page(report(tmp_path, entry())).tags.count("figure") == 1
    page = Page(report(tmp_path, entry("FacT"), entry("LoRA")))
    assert page.tags.count("figure") == page.tags.count("svg") == 2
    assert [row[0] for row in page.rows] == ["method", "FacT", "LoRA"]


def test_curves_are_drawn_with_text(tmp_path: Path) -> None:
    words = "".join(Page(report(tmp_path, entry())).text)
    for word in ("training loss", "validation accuracy", "epoch"):
        assert word in words


def test_names_are_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script> & $\\frac$"
    text = report(tmp_path, entry(nasty), entry("b"), title=nasty, text=nasty)
    page = Page(text)
    assert "script" not in page.tags
    assert page.rows[1][0] == nasty


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = report(tmp_path, entry("a"), entry("b"))
    # what is left are names of XML namespaces, which nobody fetches
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert all(link.startswith("#") for link in Page(text).links)
    assert "@import" not in text
    assert "script" not in Page(text).tags


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    assert report(tmp_path, entry()) == report(tmp_path, entry())


@pytest.mark.parametrize("name", ["matplotlib.figure", "jinja2"])
def test_missing_extra_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pt.FitError, match=r"a report needs an extra .*pip install 'petiole\[plot\]'"):
        report(tmp_path, entry())
    assert not (tmp_path / "report.html").exists()


def test_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(pt.FitError, match=r"report\.html cannot be written: No such file or directory"):
        report(tmp_path / "nowhere", entry())
