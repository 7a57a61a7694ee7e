"""One HTML page about one or several runs: a table, the curves, and accuracy against bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FitError
from ..files.container import atomic_write
from .loop import FitResult


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
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2b21 }
 table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
 th, td { padding: .4rem .6rem; border-bottom: 1px solid #cfd8d2; text-align: right }
 th:first-child, td:first-child { text-align: left }
 figure { margin: 1.5rem 0 } figcaption { color: #56665c; font-size: .9rem } svg { max-width: 100%; height: auto }
</style>
<h1>{{ title }}</h1>
<p>{{ text }}</p>
<table><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>The kept weights are those with the best validation accuracy; nothing was selected on test.</p>
{% for caption, figure in figures %}<figure>{{ figure|safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</html>
"""

COLUMNS = ("method", "test", "validation", "test, last epoch", "trained parameters", "file [bytes]", "seconds")


def row_of(entry: Entry) -> tuple[str, ...]:
    """Returns an entry as the cells of a table with `COLUMNS`."""
    m = entry.result.metrics
    shares = [f"{m[k]:.1%}" if k in m else "-" for k in ("test_accuracy", "val_accuracy", "last_test_accuracy")]
    return (entry.name, *shares, f"{m['trained_parameters']:,.0f}", f"{entry.num_bytes:,}", f"{m['seconds']:.0f}")


def write_report(path: Path, title: str, text: str, entries: Sequence[Entry]) -> None:
    """Writes a page that stands alone: tables and plots in one file.

    Raises:
        FitError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise FitError("a report needs an extra: pip install 'petiole[plot]'") from error
    figures = [("Loss (left) and validation accuracy (right) by epoch.", _curves(entries))]
    if len(entries) > 1:
        figures.append(("Test accuracy against the size of the plugin file.", _sizes(entries)))
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    html = page.render(title=title, text=text, columns=COLUMNS, rows=map(row_of, entries), figures=figures)
    atomic_write(path, html.encode())


def _curves(entries: Sequence[Entry]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for entry in entries:
        history = entry.result.history
        left.plot([row["epoch"] for row in history], [row["loss"] for row in history], label=entry.name)
        scored = [row for row in history if "val_accuracy" in row]
        right.plot([row["epoch"] for row in scored], [row["val_accuracy"] for row in scored], label=entry.name)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    right.legend(frameon=False)
    return _svg(figure)


def _sizes(entries: Sequence[Entry]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for entry in entries:
        accuracy = entry.result.metrics.get("test_accuracy", entry.result.metrics.get("last_val_accuracy", 0.0))
        axes.scatter(entry.num_bytes / 1024, accuracy)
        axes.annotate(entry.name, (entry.num_bytes / 1024, accuracy), textcoords="offset points", xytext=(6, 4))
    axes.set(xscale="log", xlabel="plugin file [KiB]", ylabel="test accuracy")
    return _svg(figure)


def _svg(figure) -> str:  # type: ignore[no-untyped-def]
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
