"""`petiole predict`: classify images."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import AsJson, OtherBackbone, PluginFile


def predict(
    file: PluginFile,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them")],
    top: Annotated[int, typer.Option(help="Classes to show per image", min=1)] = 1,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Classify images and print class and probability.

    Example: petiole predict runs/digits-fact/plugin.safetensors scans/ --top 3 --json
    """
    from ..fit.evaluate import predict as classify
    from ..tasks import load_images, open_image
    from . import _show
    from ._options import load_model

    paths = load_images(images)
    model = load_model(file, backbone)
    names = model.classes or tuple(map(str, range(10**6)))
    answers = []
    for path, row in zip(paths, classify(model, map(open_image, paths)), strict=True):
        best = row.topk(min(top, len(row)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        classes = [{"class": names[i], "probability": round(p, 4)} for p, i in pairs]
        answers.append((str(path), classes))
    if as_json:
        _show.as_json([{"image": image, "classes": classes} for image, classes in answers])
        return
    rows = [(image, *(f"{c['class']} {c['probability']:.1%}" for c in classes)) for image, classes in answers]
    _show.table(("image", *(f"#{i}" for i in range(1, len(rows[0])))), rows)
