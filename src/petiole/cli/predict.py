"""`petiole predict`: classify images."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson, OtherBackbone, PluginFile

if TYPE_CHECKING:
    from PIL import Image


def predict(
    file: PluginFile,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them")],
    top: Annotated[int, typer.Option(help="Classes to show per image", min=1)] = 1,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Classify images: class and probability."""
    from ..tasks import load_images, open_image
    from ..train.evaluate import predict as classify
    from ..train.progress import Progress
    from . import _show
    from ._options import load_model

    paths = load_images(images)
    model = load_model(file, backbone)

    def opened(bar: Progress) -> "Iterator[Image.Image]":
        for done, path in enumerate(paths, start=1):
            yield open_image(path)
            bar.at(done)

    with Progress("classifying images", len(paths), is_aside=True) as bar:
        probabilities = classify(model, opened(bar))
    answers = []
    for path, row in zip(paths, probabilities, strict=True):
        best = row.topk(min(top, len(row)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        # where the backbone's own classifier answers, the names of its classes are not known
        classes = [{"class": model.classes[i] if model.classes else str(i), "probability": p} for p, i in pairs]
        answers.append((str(path), classes))
    if as_json:
        _show.as_json([{"image": image, "classes": classes} for image, classes in answers])
        return
    rows = [(image, *(f"{c['class']} {c['probability']:.1%}" for c in classes)) for image, classes in answers]
    _show.table(("image", *(f"#{i}" for i in range(1, len(rows[0])))), rows)
