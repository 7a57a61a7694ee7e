"""Figures as SVG, drawn by matplotlib."""

import io
from collections.abc import Callable, Sequence
from typing import Any

# text stays text, and equal figures give equal bytes
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "petiole"}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def svg(draw: Callable[[Sequence[Any]], None], num_axes: int, size: tuple[float, float]) -> str:
    """Returns a figure as an SVG file.

    Args:
        draw: Draws on its axes.
        num_axes: How many of them there are, side by side.
        size: Width and height [inches].
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, num_axes, squeeze=False)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return buffer.getvalue()
