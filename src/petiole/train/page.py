"""A page of HTML that stands alone: sections of text, a table and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FitError, PluginFileError
from ..files.container import atomic_write
from .figures import svg

T = TypeVar("T")

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
{% for section in sections %}{% if section.heading %}<h2>{{ section.heading }}</h2>
{% endif %}<p>{{ section.text }}</p>
{% if section.rows %}<table>
<tr>{% for c in section.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endif %}{% if section.note %}<p>{{ section.note }}</p>
{% endif %}{% for caption, figure in section.figures %}<figure>{{ figure|safe }}
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}{% endfor %}</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        text: A sentence or two.
        columns: Heads of the table.
        rows: Its rows; without any there is no table.
        figures: Caption and SVG of each figure.
        heading: What stands above; nothing for the first section.
        note: A sentence below the table.
    """

    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Sequence[tuple[str, str]] = field(default=(), repr=False)
    heading: str = ""
    note: str = ""


def require() -> None:
    """Checks that what draws a page is installed.

    Raises:
        FitError: It is not.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise FitError(f"a report needs an extra ({error.name} is missing): pip install 'petiole[plot]'") from error


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes a page.

    Args:
        path: The file.
        title: Its heading.
        sections: Its parts.

    Raises:
        FitError: jinja2 is not installed, or the file cannot be written.
    """
    require()
    import jinja2

    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    try:
        atomic_write(path, page.render(title=title, sections=sections).encode())
    except PluginFileError as error:
        raise FitError(str(error)) from error


def draw(
    drawing: Callable[[Sequence[Any], T], None], data: T, num_axes: int, size: tuple[float, float] = (9, 3.2)
) -> str:
    """Returns a figure as an SVG element.

    Args:
        drawing: Draws data on axes.
        data: What it draws.
        num_axes: Axes side by side.
        size: Width and height [inches].
    """
    text = svg(lambda axes: drawing(axes, data), num_axes, size)
    return text[text.index("<svg") :]


def plain(text: str) -> str:
    """Returns a text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
