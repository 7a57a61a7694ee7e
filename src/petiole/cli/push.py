"""`petiole push`: share a plugin file on the Hugging Face Hub."""

from typing import Annotated

import typer

from ._options import AsJson, PluginFile


def push(
    file: PluginFile,
    repo: Annotated[str, typer.Argument(help="Repository, OWNER/NAME; made if there is none", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private")] = False,
    dataset: Annotated[
        str | None,
        typer.Option(help="What the plugin was trained on, for the card: OWNER/NAME on the Hub, or any name"),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="Licence for the card as the Hub calls it, e.g. apache-2.0")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit")] = None,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Replace a README.md that petiole did not write or you have edited")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Share a plugin file on the Hugging Face Hub.

    Uploads plugin.safetensors and a filled model card in one commit and prints the repository's URL. Log in once with
    `hf auth login`.
    """
    from dataclasses import asdict

    from ..files.hub import upload
    from ..files.hub_errors import quieten
    from . import _show

    quieten()
    done = upload(
        file, repo, private=private, message=message, dataset=dataset, license_id=license_id, replace_card=replace_card
    )
    if done.is_card_kept:
        _show.say("kept its README.md, which petiole did not write or which was edited: --replace-card replaces it")
    if as_json:
        _show.as_json({"repo": repo, **asdict(done)})
        return
    what = f"{file} ({_show.size(file.stat().st_size)})"
    _show.say(f"pushed {what} to {repo}" if done.is_changed else f"{repo} has {file} already: nothing was pushed")
    print(done.url)
