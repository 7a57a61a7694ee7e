"""What a long run shows: a bar on a terminal, plain lines elsewhere, both on stderr."""

import sys
import time
from types import TracebackType


class Progress:
    """Shows how far a run is.

    Args:
        title: What is being done.
        total: Steps in all.
        is_shown: Whether anything is printed.
    """

    def __init__(self, title: str, total: int, *, is_shown: bool = True) -> None:
        self.title, self.total, self.is_shown = title, total, is_shown
        self.last, self.note = time.monotonic(), ""
        self.bar = _bar() if is_shown and sys.stderr.isatty() else None
        self.row = None if self.bar is None else self.bar.add_task(title, total=total, note="")

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def at(self, done: int, note: str = "") -> None:
        """Shows that `done` steps are done; a note, e.g. the last accuracy, stays until the next."""
        self.note = note or self.note
        if self.bar is not None and self.row is not None:
            self.bar.update(self.row, completed=done, note=self.note)
        elif self.is_shown and (done >= self.total or time.monotonic() - self.last > 10):
            # a line every ten seconds: often enough to see life in a log, seldom enough to read it
            self.last = time.monotonic()
            print(f"{self.title}: {done}/{self.total} {self.note}".rstrip(), file=sys.stderr, flush=True)


def _bar():  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=Console(stderr=True))
