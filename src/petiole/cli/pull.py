"""`petiole pull`: fetch a plugin file from the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson


def pull(
    repo: Annotated[str, typer.Argument(help="Repository, OWNER/NAME", metavar="REPO")],
    out: Annotated[Path | None, typer.Option(help="File to write; by default it stays in the Hub's cache")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a plugin file from the Hugging Face Hub.

    Verifies every byte and prints where the file is, so that another command can take it.
    """
    from ..files import inspect
    from ..files.hub import pull as fetch
    from ..files.hub_errors import quieten
    from . import _show

    quieten()
    path = fetch(repo, out=out, revision=revision, force=force)
    info = inspect(path)
    if as_json:
        _show.as_json({"repo": repo, "path": str(path), "bytes": info.total_bytes, "backbone": info.backbone["name"]})
        return
    _show.say(f"pulled {repo}: {_show.size(info.total_bytes)}, {len(info.classes or ())} classes")
    print(path)
