"""A backbone adapted to the first experience of a stream, and frozen from then on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from ..core.adapted import Adapted
from ..core.plugin import Plugin
from ..errors import TaskError
from ..joining import adapt
from ..tasks.task import Split, Task
from ..train.loop import fit
from ..train.recipe import Recipe


def adapt_first(
    backbone: nn.Module,
    plugins: Sequence[Plugin],
    task: Task,
    labels: Sequence[int],
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> Adapted:
    """Returns a backbone with plugins that were trained on some classes of a task, those of the first experience.

    Its features are what any head can go on with: `Extractor(model)` leaves out the head that was trained along.
    Whatever comes later changes nothing of it, so that what heads keep of earlier experiences stays right.

    Source: Zhou et al., 2023, arXiv 2303.07338, and McDonnell et al., 2023, arXiv 2307.02251, which adapt by the first
    experience alone; the plugin is any of ours.

    Args:
        backbone: A pretrained model; never written to.
        plugins: What adapts it, e.g. `[FacT(rank=16)]`.
        task: What the stream is cut from; its test images take no part in the choice of weights.
        labels: Classes to train on: `stream[0].classes`.
        recipe: How to train.
        out: Run folder of the training, which goes on where it was stopped; None keeps nothing.
        progress: Whether to show how far it is, on stderr.

    Raises:
        TaskError: A class has no training image.
        PluginError: There are fewer than two classes, or a plugin fits no site.
        FitError: As of `petiole.fit`.

    Example:
        >>> import petiole as pt
        >>> task = pt.open_task("digits")
        >>> recipe = pt.Recipe(epochs=1)
        >>> model = adapt_first(pt.backbone("micro"), [pt.FacT(rank=4)], task, [0, 1], recipe, progress=False)
    """
    recipe = recipe or Recipe()
    own = of_classes(task, labels)
    model = adapt(backbone, *plugins, classes=own.classes, seed=recipe.seed)
    fit(model, own, recipe, out=out, progress=progress)
    return model


def of_classes(task: Task, labels: Sequence[int]) -> Task:
    """Returns the part of a task that is of some classes, which are numbered anew in the order given.

    Raises:
        TaskError: A class has no training image, or is none of the task's.
    """
    known = set(task.train.labels.tolist())
    if absent := [label for label in labels if label not in known]:
        raise TaskError(f"{task.name} has no training image of class {absent[0]}")
    places = np.full(len(task.classes), -1)
    places[list(labels)] = range(len(labels))
    splits = {}
    for part in ("train", "val", "test"):
        split: Split | None = getattr(task, part)
        rows = np.empty(0, np.int64) if split is None else np.flatnonzero(places[split.labels] >= 0)
        if split is not None and len(rows):
            splits[part] = Split(split.part(rows).images, places[split.labels[rows]])
    return Task(task.name, tuple(task.classes[label] for label in labels), **splits)
