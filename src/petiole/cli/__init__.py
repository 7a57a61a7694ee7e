"""The command line: one file per command, texts and exit codes only.

Nothing here imports torch before a command runs, so that help is instant.
"""

import sys


def main() -> None:
    """Runs the command line; an expected error becomes one line on stderr and exit code 1."""
    from ..errors import PetioleError
    from .app import app

    try:
        app()
    except PetioleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
