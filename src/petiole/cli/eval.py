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
    """Score a plugin file on one split of a task.

    Example: petiole eval runs/digits-fact/plugin.safetensors digits
    """
    from dataclasses import asdict

    from ..errors import TaskError
    from ..fit.evaluate import evaluate as score
    from ..tasks import open_task
    from ..tasks.cache import Pixels
    from ..tasks.transform import Transform
    from . import _show
    from ._options import load_model

    data = open_task(task, seed=seed)
    images = {"train": data.train, "val": data.val, "test": data.test}.get(split)
    if images is None:
        raise TaskError(f"{data.name} has no split {split!r}: choose train, val or test, as far as the task has them")
    model = load_model(file, backbone)
    if model.classes is not None and tuple(data.classes) != model.classes:
        raise TaskError(
            f"{file} knows {len(model.classes)} classes ({model.classes[0]}, ...), {data.name} has "
            f"{len(data.classes)} ({data.classes[0]}, ...): they must be the same, in the same order"
        )
    scores = score(model, Pixels(images, Transform(model.input_config)))
    if as_json:
        _show.as_json({"task": data.name, "split": split, **asdict(scores)})
        return
    _show.table(
        ("task", "split", "images", "accuracy", "mean class accuracy"),
        [(data.name, split, str(scores.num_images), f"{scores.accuracy:.2%}", f"{scores.mean_class_accuracy:.2%}")],
    )
