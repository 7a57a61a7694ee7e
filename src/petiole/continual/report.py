"""One HTML page about one or several ways through streams: a table, accuracies over time, and every matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FitError
from ..train.page import Section, draw, plain, write_page
from .journey import LEARNER, Journey, recalled
from .saving import inspect_learner

COLUMNS = ("learner", "final average", "over time", "forgetting", "learning accuracy", "classes", "file [bytes]", "s")
# above this many columns, numbers in the cells of a matrix cannot be read
_MOST_NUMBERS = 12


@dataclass(frozen=True)
class Told:
    """A way through a stream as a report tells it.

    Args:
        name: What it is called in the table.
        journey: What it came to.
        num_bytes: Size of the learner's file [bytes].
    """

    name: str
    journey: Journey
    num_bytes: int


def read_told(folder: Path) -> Told:
    """Returns the way in a run folder, however far it is.

    Raises:
        FitError: The folder holds no way through a stream.
        PluginFileError: Its learner is damaged.
    """
    path = folder / LEARNER
    if not path.is_file():
        raise FitError(f"{folder} holds no {LEARNER}: give a run folder of `petiole stream fit`")
    info = inspect_learner(path)
    if info.journey is None:
        raise FitError(f"{path} is no learner of a run: it was saved by itself and has no history")
    return Told(folder.name, recalled(info.journey), info.total_bytes)


def row_of(told: Told) -> tuple[str, ...]:
    """Returns a way as the cells of a table with `COLUMNS`."""
    metrics, history = told.journey.metrics, told.journey.history
    names = ("final_average", "average_incremental", "forgetting_since_best", "learning_accuracy")
    shares = [f"{metrics[name]:.1%}" if name in metrics else "-" for name in names]
    num_classes = f"{history[-1]['num_classes']:.0f}" if history else "0"
    return (told.name, *shares, num_classes, f"{told.num_bytes:,}", f"{metrics['seconds']:.1f}")


def write_stream_report(path: Path, title: str, text: str, ways: Sequence[Told]) -> None:
    """Writes a page that stands alone.

    Args:
        path: The file.
        title: Its heading.
        text: A sentence below.
        ways: What it is about.

    Raises:
        FitError: matplotlib or jinja2 is not installed, or the file cannot be written.
    """
    from ..train.page import require

    require()
    figures = []
    if any(way.journey.matrix.columns for way in ways):
        figures.append(
            (
                "Mean accuracy over all that was met (left), and accuracy of each right after it was met (right).",
                draw(_curves, ways, 2),
            )
        )
    note = (
        "Accuracies are of test images, of classes met so far. Final average: mean over the columns of the matrix "
        "after the last experience; over time: mean of that average after each experience; forgetting: what is gone of "
        "the best accuracy that a column ever had; learning accuracy: what a column had right after it was met."
    )
    whole = Section(text, COLUMNS, [row_of(way) for way in ways], figures, note=note)
    write_page(path, title, [whole, *(_matrix_of(way) for way in ways if way.journey.matrix.columns)])


def _matrix_of(way: Told) -> Section:
    matrix = way.journey.matrix
    caption = "Each row is a moment, each column an experience, or a class of a stream without boundaries [%]."
    side = min(9.0, 2.5 + 0.5 * len(matrix.columns))
    figure = draw(_cells, way, 1, (side, max(2.0, 1.2 + 0.4 * len(matrix.rows))))
    return Section("What it knew of each experience after each.", figures=[(caption, figure)], heading=way.name)


def _curves(axes: Sequence[Any], ways: Sequence[Told]) -> None:
    left, right = axes
    for way in ways:
        matrix = way.journey.matrix
        times = range(len(matrix.rows))
        left.plot(times, [100 * value for value in matrix.averages()], ".-", label=plain(way.name))
        first = [(t, 100 * matrix.rows[t][i]) for i, t in enumerate(matrix.met) if t < len(matrix.rows)]
        right.plot([t for t, _ in first], [value for _, value in first], ".-", label=plain(way.name))
    left.set(xlabel="experience", ylabel="average accuracy [%]")
    right.set(xlabel="experience", ylabel="accuracy when met [%]")
    left.legend(frameon=False)
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)


def _cells(axes: Sequence[Any], way: Told) -> None:
    matrix = way.journey.matrix
    values = 100 * matrix.values
    image = axes[0].imshow(values.numpy(), cmap="Greens", vmin=0, vmax=100, aspect="auto")
    axes[0].figure.colorbar(image, ax=axes[0])
    if len(matrix.columns) <= _MOST_NUMBERS:
        for (row, column), value in ((place, float(values[place])) for place in _places(values.shape)):
            if not math.isnan(value):
                colour = "white" if value > 60 else "black"
                axes[0].text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes[0].set_xticks(range(len(matrix.columns)), [plain(name) for name in matrix.columns], rotation=45)
    axes[0].set_yticks(range(len(matrix.rows)), [str(t) for t in range(len(matrix.rows))])
    axes[0].set(xlabel="tested on", ylabel="after experience")


def _places(shape: Sequence[int]) -> list[tuple[int, int]]:
    return [(row, column) for row in range(shape[0]) for column in range(shape[1])]
