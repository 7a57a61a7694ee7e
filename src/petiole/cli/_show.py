"""How results look on the terminal."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table on stdout; the first column is text, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    # a pipe has no width: give a table all it wants instead of folding it at 80 columns
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(grid)


def say(text: str) -> None:
    """Prints what happens, on stderr."""
    print(text, file=sys.stderr, flush=True)


def as_json(value: Any) -> None:
    """Prints a value for machines, on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def size(num_bytes: int) -> str:
    """Returns a number of bytes in words, e.g. `12.3 KiB`."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Prints names and what they are, one a line, on stdout."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
