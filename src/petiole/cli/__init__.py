"""The command line: one file per command, texts and exit codes only.

Nothing here imports torch before a command runs, so that help is instant.
"""

import sys


def main() -> None:
    """Runs the command line; an expected error becomes one line on stderr and exit code 1."""
    from ..errors import PetioleError
    from .app import app

    try:
        app(prog_name="petiole")
    except PetioleError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _fail(text: str) -> None:
    # in one piece, so that several processes do not write into each other's lines
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    sys.exit(1)
