"""What long work shows: a bar on a terminal, plain lines elsewhere, both on stderr."""

import sys
import time
from types import TracebackType

# As many notes are news worth a line each; of more, one every interval is shown.
_FEW_NOTES = 20


class Progress:
    """Shows how far a piece of work is.

    Without a terminal: a line for each new note where few are expected, at least one every interval while something
    happens, and one at the end.

    Args:
        title: What is being done.
        total: Steps in all.
        is_shown: Whether anything is printed.
        num_notes: How many notes are expected.
        is_aside: Whether the work matters only while it lasts: the bar goes away, and the end is no line.
        interval: Time between two plain lines [s]: often enough to see life in a log, seldom enough to read it.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        is_shown: bool = True,
        num_notes: int = 0,
        is_aside: bool = False,
        interval: float = 10.0,
    ) -> None:
        self.title, self.total, self.is_shown, self.is_aside = title, total, is_shown, is_aside
        self.tells_notes, self.interval = num_notes <= _FEW_NOTES, interval
        self.last, self.note = time.monotonic(), ""
        self.bar = _bar(is_aside) if is_shown and sys.stderr.isatty() else None
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
        is_news = bool(note) and note != self.note and self.tells_notes
        self.note = note or self.note
        if self.bar is not None and self.row is not None:
            self.bar.update(self.row, completed=done, note=self.note)
            return
        is_end = done >= self.total and not self.is_aside
        if is_news or is_end or time.monotonic() - self.last >= self.interval:
            self.say(f"{done}/{self.total} {self.note}".rstrip())

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if self.bar is not None:
            self.bar.console.print(f"{self.title}: {text}", markup=False, highlight=False)
        elif self.is_shown:
            self.last = time.monotonic()
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def _bar(is_aside: bool):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True), transient=is_aside)
