"""`petiole stream predict`: classify images with a learner."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import _stream as st
from ._options import AsJson, OtherBackbone

_BATCH = 64


def predict(
    file: st.LearnerFile,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them")],
    among: Annotated[
        str | None, typer.Option(help="Classes to choose from, with commas between [default: all that were met]")
    ] = None,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Classify images: the class of each.

    A learner with a head for each experience needs `--among`, classes of one experience.
    """
    from ..continual.scoring import classify, labels_of
    from ..tasks import load_images, open_image
    from ..train.progress import Progress
    from . import _show

    paths = load_images(images)
    learner, info = st.load(file, backbone)
    asked = None if among is None else labels_of(among.split(","), info.classes)
    with Progress("classifying images", len(paths), is_aside=True) as bar:
        found = classify(learner, [partial(open_image, path) for path in paths], asked, _BATCH, bar.at)
    names = [info.classes[label] if label >= 0 else None for label in found]
    if as_json:
        _show.as_json([{"image": str(path), "class": name} for path, name in zip(paths, names, strict=True)])
        return
    rows = [(str(path), name or "nothing learnt yet") for path, name in zip(paths, names, strict=True)]
    _show.table(("image", "class"), rows)
