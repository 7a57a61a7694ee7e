"""`petiole show-merge`: a picture of the patches of an image that share a token."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson

if TYPE_CHECKING:
    from ..core.adapted import Adapted

DEFAULT_BUDGET = 8
REDUCERS = ("tome", "evit")


def show_merge(
    image: Annotated[Path, typer.Argument(help="Image file", metavar="IMAGE")],
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone", "-b", help="`micro` or a timm name with its tag [default: that of the plugin file, or micro]"
        ),
    ] = None,
    plugin: Annotated[Path | None, typer.Option("--plugin", "-p", help="Plugin file that is on the backbone")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens each block removes (8), share it keeps (0.9), line from many to few (8:-1), or list by block "
            f"(8,8,0,4) [default: that of the plugin file, or {DEFAULT_BUDGET}]"
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="tome or evit [default: that of the plugin file, or tome]")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="After how many blocks to show it, e.g. 3,6,12 [default: half of them and all]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Picture to write [default: NAME-merged.png]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the picture if it exists")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw which patches of an image merge.

    Merged patches have their mean colour, pruned ones are grey, and a line runs between different tokens.
    """
    import io

    from ..errors import PluginFileError
    from ..files import atomic_write
    from ..tasks import open_image
    from ..tasks.transform import Transform
    from ..train.merge_map import draw, trace
    from . import _show

    out = Path(f"{image.stem}-merged.png") if out is None else out
    if out.suffix != ".png":
        raise PluginFileError(f"{out} is no name for a picture of this command: let it end in .png")
    if out.exists() and not force:
        raise PluginFileError(f"{out} exists already: choose another name, or pass --force to replace it")
    if not out.parent.is_dir():
        raise PluginFileError(f"there is no folder {out.parent} to write {out.name} into: make it first")
    chosen, photo = _read_blocks(blocks), open_image(image)
    model = _model(plugin, backbone, method, budget)
    transform = Transform(model.input_config)
    pixels = transform.pixels(photo)
    merges = trace(model, transform.normalize(pixels.unsqueeze(0))[0])
    picture, file = draw(pixels, merges, chosen), io.BytesIO()
    picture.save(file, "PNG")
    atomic_write(out, file.getvalue())
    counts = merges.num_tokens
    if as_json:
        sizes = {"size": picture.size, "grid": merges.grid, "num_tokens": counts}
        _show.as_json({"image": str(image), "model": repr(model), "file": str(out), **sizes})
        return
    rows = [
        (str(block), str(counts[block - 1]), str(counts[block]), str(merges.largest(block)))
        for block in range(1, merges.depth + 1)
    ]
    _show.table(("block", "tokens before", "after", "most patches in one"), rows)
    _show.say(f"wrote {out}: {model}, {picture.width} x {picture.height} pixels")


def _read_blocks(text: str | None) -> list[int] | None:
    """Returns the numbers of blocks that were written."""
    from ..errors import PluginError

    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PluginError(f"--blocks takes whole numbers with commas between, e.g. 3,6,12; got {text!r}") from error


def _model(plugin: Path | None, backbone: str | None, method: str | None, budget: str | None) -> "Adapted":
    """Returns a model with a token budget: the one asked for, before that of its file."""
    from ..backbones.bundled import backbone as build
    from ..compressing import compress
    from ..core.plugin import Reducer
    from ..errors import PluginError, nearest
    from ._options import load_model, read_budget

    if method not in (None, *REDUCERS):
        raise PluginError(
            f"{method!r} removes no tokens{nearest(str(method), REDUCERS)}: choose {' or '.join(REDUCERS)}"
        )
    asked = None if budget is None else read_budget("--budget", budget)
    if plugin is None:
        return compress(build(backbone or "micro"), DEFAULT_BUDGET if asked is None else asked, method=method or "tome")
    model = load_model(plugin, backbone)
    own = next((p for p in model.taps.plugins if isinstance(p, Reducer)), None)
    settings = own.settings() if own is not None and method in (None, own.method) else {}
    if settings and asked is None:
        return model
    known = (DEFAULT_BUDGET, "tome") if own is None else (own.budget, own.method)
    # the other settings of its file stay
    further = {key: value for key, value in settings.items() if key != "budget"}
    return compress(model, known[0] if asked is None else asked, method=method or known[1], **further)
