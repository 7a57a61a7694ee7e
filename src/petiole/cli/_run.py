"""What the commands that train share: which process speaks, and what Ctrl-C says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


def is_main() -> bool:
    """Whether this is the process that prints: the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def goes_on(folder: Path) -> Iterator[None]:
    """While it is entered, Ctrl-C says how the run goes on, and ends the command with exit code 130."""
    from . import _show

    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            _show.say(f"stopped: the same command goes on from the state in {folder}")
        raise typer.Exit(130) from None
