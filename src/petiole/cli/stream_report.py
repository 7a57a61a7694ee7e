"""`petiole stream report`: compare ways through streams on one page."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of `petiole stream fit`")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page [default: report.html in the first run folder]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page about runs: table, curves, matrices."""
    from ..continual.report import COLUMNS, read_told, row_of, write_stream_report
    from ..train.run import REPORT
    from . import _show

    ways = [read_told(folder) for folder in runs]
    page = out or runs[0] / REPORT
    title = " and ".join(way.name for way in ways) if len(ways) < 3 else f"{len(ways)} ways through a stream"
    write_stream_report(page, title, "What learners knew on their way.", ways)
    if as_json:
        _show.as_json([{"run": str(run), **way.journey.metrics} for run, way in zip(runs, ways, strict=True)])
    else:
        _show.table(COLUMNS, [row_of(way) for way in ways])
    _show.say(f"report: {page}")
