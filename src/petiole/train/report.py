"""One HTML page about one or several runs: a table, the curves, and accuracy against bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FitError, PluginFileError
from ..files.container import atomic_write
from .figures import svg
from .job import FitResult
from .search_report import candidate_columns, candidate_rows, draw_candidates, numeric_axes
from .searching import SearchResult

T = TypeVar("T")


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


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2b21 }
 table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
 th, td { padding: .4rem .6rem; border-bottom: 1px solid #cfd8d2; text-align: right }
 th:first-child, td:first-child { text-align: left }
 figure { margin: 1.5rem 0 } figcaption { color: #56665c; font-size: .9rem } svg { max-width: 100%; height: auto }
</style></head>
<body>
<h1>{{ title }}</h1>
<p>{{ text }}</p>
<table>
<tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>Test and validation are accuracies of the weights after the kept epoch. Nothing was selected on test.</p>
{% for caption, figure in figures %}<figure>{{ figure|safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}{% if search %}<h2>Search for settings</h2>
<p>{{ search.text }}</p>
<table>
<tr>{% for c in search.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in search.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if search.figure %}<figure>{{ search.figure|safe }}<figcaption>Validation accuracy of the candidates, the chosen one
 in a ring.</figcaption></figure>
{% endif %}{% endif %}</body>
</html>
"""

COLUMNS = (
    "method", "test", "validation", "test, last epoch", "kept epoch", "trained parameters", "file [bytes]", "seconds",
)  # fmt: skip


def row_of(entry: Entry) -> tuple[str, ...]:
    """Returns an entry as the cells of a table with `COLUMNS`."""
    m = entry.result.metrics
    shares = [f"{m[k]:.1%}" if k in m else "-" for k in ("test_accuracy", "val_accuracy", "last_test_accuracy")]
    numbers = [f"{m['best_epoch']:.0f}", f"{m['trained_parameters']:,.0f}", f"{entry.num_bytes:,}"]
    return (entry.name, *shares, *numbers, f"{m['seconds']:.0f}")


def require() -> None:
    """Checks that what draws a report is installed.

    Raises:
        FitError: It is not.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise FitError(f"a report needs an extra ({error.name} is missing): pip install 'petiole[plot]'") from error


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
    import jinja2

    figures = [("Training loss (left) and validation accuracy (right) by epoch.", _draw(_curves, entries, 2))]
    if len(entries) > 1 and all("test_accuracy" in entry.result.metrics for entry in entries):
        figures.append(("Test accuracy against the size of the plugin file.", _draw(_sizes, entries, 1)))
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    html = page.render(
        title=title, text=text, columns=COLUMNS, rows=map(row_of, entries), figures=figures, search=_search(found)
    )
    try:
        atomic_write(path, html.encode())
    except PluginFileError as error:
        raise FitError(str(error)) from error


def _search(found: SearchResult | None) -> dict[str, Any] | None:
    """Returns what the page shows of a search."""
    if found is None:
        return None
    num_axes = len(numeric_axes(found))
    return {
        "text": f"Each of {len(found.candidates)} candidates was trained on the training split and scored on "
        "validation after its last epoch; none of them has seen a test image.",
        "columns": candidate_columns(found),
        "rows": candidate_rows(found),
        "figure": _draw(draw_candidates, found, num_axes) if num_axes else None,
    }


def _curves(axes: Sequence[Any], entries: Sequence[Entry]) -> None:
    left, right = axes
    for entry in entries:
        history = entry.result.history
        left.plot([row["epoch"] for row in history], [row["loss"] for row in history], ".-", label=_plain(entry))
        scored = [row for row in history if "val_accuracy" in row]
        right.plot([row["epoch"] for row in scored], [row["val_accuracy"] for row in scored], ".-", label=_plain(entry))
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    right.legend(frameon=False)


def _sizes(axes: Sequence[Any], entries: Sequence[Entry]) -> None:
    for entry in entries:
        place = (entry.num_bytes / 1024, entry.result.metrics["test_accuracy"])
        axes[0].scatter(*place)
        axes[0].annotate(_plain(entry), place, textcoords="offset points", xytext=(6, 4))
    axes[0].set(xscale="log", xlabel="plugin file [KiB]", ylabel="test accuracy")


def _plain(entry: Entry) -> str:
    """Returns a name in which matplotlib sees no formula."""
    return entry.name.replace("$", r"\$")


def _draw(draw: Callable[[Sequence[Any], T], None], data: T, num_axes: int) -> str:
    """Returns a figure as an SVG element."""
    text = svg(lambda axes: draw(axes, data), num_axes, (9, 3.2))
    return text[text.index("<svg") :]
