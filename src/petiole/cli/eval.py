"""`petiole eval`: score a plugin file on a task."""

from typing import Annotated

import typer

from ._options import TASK_HELP, AsJson, OtherBackbone, PluginFile


def evaluate(
    file: PluginFile,
    task: Annotated[str, typer.Argument(help=TASK_HELP)],
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the task's splits, as it was for fit")] = 0,
    backbone: OtherBackbone = None,
    as_json: AsJson = False,
) -> None:
    """Score a plugin file on one split of a task."""
    from dataclasses import asdict

    from ..files import inspect
    from ..tasks import open_task
    from ..tasks.cache import Pixels
    from ..tasks.transform import Transform
    from ..train.config import check
    from ..train.evaluate import evaluate as score
    from ..train.progress import Progress
    from . import _show
    from ._options import load_model, part_of

    inspect(file)
    data = open_task(task, seed=seed)
    images = part_of(data, split)
    model = load_model(file, backbone)
    check(model, data)
    with Progress("reading images", len(images), is_aside=True) as bar:
        pixels = Pixels(images, Transform(model.input_config), progress=lambda done, total: bar.at(done))
    with Progress("scoring images", len(images), is_aside=True) as bar:
        scores = score(model, pixels, progress=bar.at)
    if as_json:
        _show.as_json({"task": data.name, "split": split, **asdict(scores)})
        return
    _show.table(
        ("task", "split", "images", "accuracy", "mean class accuracy"),
        [(data.name, split, str(scores.num_images), f"{scores.accuracy:.2%}", f"{scores.mean_class_accuracy:.2%}")],
    )
