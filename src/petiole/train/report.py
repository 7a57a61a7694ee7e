"""One HTML page about one or several runs: a table, the curves, and accuracy against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .job import FitResult
from .page import Section, draw, plain, require, write_page
from .search_report import candidate_columns, candidate_rows, draw_candidates, numeric_axes
from .searching import SearchResult


@dataclass(frozen=True)
class Entry:
    """One run in a report.

    Args:
        name: What it is called in the table.
        result: Its metrics and history.
        num_bytes: Size of its plugin file [bytes].
    """

    name: str
    result: FitResult
    num_bytes: int


COLUMNS = (
    "method", "test", "validation", "test, last epoch", "kept epoch", "trained parameters", "file [bytes]", "seconds",
)  # fmt: skip


def row_of(entry: Entry) -> tuple[str, ...]:
    """Returns an entry as the cells of a table with `COLUMNS`."""
    m = entry.result.metrics
    shares = [f"{m[k]:.1%}" if k in m else "-" for k in ("test_accuracy", "val_accuracy", "last_test_accuracy")]
    numbers = [f"{m['best_epoch']:.0f}", f"{m['trained_parameters']:,.0f}", f"{entry.num_bytes:,}"]
    return (entry.name, *shares, *numbers, f"{m['seconds']:.0f}")


def write_report(
    path: Path, title: str, text: str, entries: Sequence[Entry], found: SearchResult | None = None
) -> None:
    """Writes a page that stands alone: tables and plots in one file.

    Args:
        path: The file.
        title: Its heading.
        text: A sentence below.
        entries: The runs.
        found: The search that has chosen their settings, where there was one.

    Raises:
        FitError: matplotlib or jinja2 is not installed, or the file cannot be written.
    """
    require()
    figures = [("Training loss (left) and validation accuracy (right) by epoch.", draw(_curves, entries, 2))]
    if len(entries) > 1 and all("test_accuracy" in entry.result.metrics for entry in entries):
        figures.append(("Test accuracy against the size of the plugin file.", draw(_sizes, entries, 1)))
    note = "Test and validation are accuracies of the weights after the kept epoch. Nothing was selected on test."
    runs = Section(text, COLUMNS, [row_of(entry) for entry in entries], figures, note=note)
    write_page(path, title, [runs, *_search(found)])


def _search(found: SearchResult | None) -> list[Section]:
    """Returns what the page shows of a search."""
    if found is None:
        return []
    num_axes = len(numeric_axes(found))
    text = (
        f"Each of {len(found.candidates)} candidates was trained on the training split and scored on validation after "
        "its last epoch; none of them has seen a test image."
    )
    caption = "Validation accuracy of the candidates, the chosen one in a ring."
    figures = [(caption, draw(draw_candidates, found, num_axes))] if num_axes else []
    return [Section(text, candidate_columns(found), candidate_rows(found), figures, heading="Search for settings")]


def _curves(axes: Sequence[Any], entries: Sequence[Entry]) -> None:
    left, right = axes
    for entry in entries:
        history = entry.result.history
        left.plot([row["epoch"] for row in history], [row["loss"] for row in history], ".-", label=plain(entry.name))
        scored = [row for row in history if "val_accuracy" in row]
        right.plot(
            [row["epoch"] for row in scored], [row["val_accuracy"] for row in scored], ".-", label=plain(entry.name)
        )
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    right.legend(frameon=False)


def _sizes(axes: Sequence[Any], entries: Sequence[Entry]) -> None:
    for entry in entries:
        place = (entry.num_bytes / 1024, entry.result.metrics["test_accuracy"])
        axes[0].scatter(*place)
        axes[0].annotate(plain(entry.name), place, textcoords="offset points", xytext=(6, 4))
    axes[0].set(xscale="log", xlabel="plugin file [KiB]", ylabel="test accuracy")
