"""The search in the report: all candidates with their numbers, and a plot for each number that was searched."""

from pathlib import Path
from typing import Any

import pytest

import petiole as pt
from petiole.train.record import Candidate
from petiole.train.report import write_report
from petiole.train.search_report import numeric_axes
from petiole.train.searching import SearchResult
from test_fit_report import Page, entry

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def result(*rows: tuple[dict[str, Any], float | None], chosen: int = 0) -> SearchResult:
    """A search that came to these accuracies; None diverged."""
    candidates = tuple(
        Candidate(settings, 1000 + i, 60.4 + i, accuracy, None if accuracy is not None else "the loss became nan")
        for i, (settings, accuracy) in enumerate(rows)
    )
    return SearchResult("fact", candidates, candidates[chosen], pt.Recipe())


FOUND = result(
    ({"rank": 1, "scale": 0.1, "init": "xavier"}, 0.5),
    ({"rank": 1, "scale": 100.0, "init": "xavier"}, None),
    ({"rank": 2, "scale": 0.1, "init": "xavier"}, 0.754),
    ({"rank": 2, "scale": 100.0, "init": "xavier"}, 0.25),
    chosen=2,
)


def page(folder: Path, found: SearchResult | None) -> Page:
    write_report(folder / "report.html", "A title", "A text", [entry()], found)
    return Page((folder / "report.html").read_text(encoding="utf8"))


def test_table_holds_every_candidate_in_order_and_marks_the_chosen(tmp_path: Path) -> None:
    assert page(tmp_path, FOUND).rows[2:] == [
        ["rank", "scale", "init", "validation", "trained parameters", "seconds", "chosen"],
        ["1", "0.1", "xavier", "50.0%", "1,000", "60", ""],
        ["1", "100", "xavier", "diverged", "1,001", "61", ""],
        ["2", "0.1", "xavier", "75.4%", "1,002", "62", "*"],
        ["2", "100", "xavier", "25.0%", "1,003", "63", ""],
    ]


def test_plot_has_an_axis_for_each_number_that_varies(tmp_path: Path) -> None:
    assert numeric_axes(FOUND) == ["rank", "scale"]
    shown = page(tmp_path, FOUND)
    assert shown.tags.count("svg") == 2
    words = [text.strip() for text in shown.text]
    for word in ("rank", "scale", "rank=1", "rank=2", "scale=0.1", "scale=100", "validation accuracy"):
        assert word in words


def test_search_over_names_has_a_table_and_no_plot(tmp_path: Path) -> None:
    names = result(({"init": "xavier", "deep": True}, 0.5), ({"init": "dirac", "deep": False}, 0.6), chosen=1)
    shown = page(tmp_path, names)
    assert shown.rows[-1] == ["dirac", "false", "60.0%", "1,001", "61", "*"]
    assert shown.tags.count("svg") == 1


def test_value_of_which_nothing_was_scored_is_not_drawn(tmp_path: Path) -> None:
    assert numeric_axes(result(({"lr": 1e-3}, 0.5), ({"lr": 1e30}, None))) == []


def test_run_without_a_search_has_no_such_section(tmp_path: Path) -> None:
    assert "Search for settings" not in "".join(page(tmp_path, None).text)


def test_many_lines_negative_and_huge_values_are_drawn(tmp_path: Path) -> None:
    rows = [({"scale": scale, "rank": rank}, 0.5) for scale in (-1.0, 0.0, 1e30) for rank in range(1, 13)]
    assert page(tmp_path, result(*rows)).tags.count("svg") == 2


def test_equal_searches_give_equal_pages(tmp_path: Path) -> None:
    page(tmp_path, FOUND)
    before = (tmp_path / "report.html").read_bytes()
    page(tmp_path, FOUND)
    assert (tmp_path / "report.html").read_bytes() == before


def test_names_are_escaped(tmp_path: Path) -> None:
    nasty = "<b>$\\frac$"
    shown = page(tmp_path, result(({"init": nasty, "rank": 1}, 0.5), ({"init": "b", "rank": 2}, 0.5)))
    assert shown.rows[3][0] == nasty
    assert "b" not in shown.tags
