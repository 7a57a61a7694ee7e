"""What a learner answers, and how often it is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..errors import FitError, TaskError, nearest
from .learner import Learner
from .samples import Samples
from .sources import transform_of


@dataclass(frozen=True)
class StreamScores:
    """How often a learner is right on samples.

    Args:
        accuracy: Share of samples whose class is right.
        mean_class_accuracy: Mean of that share over the classes that occur.
        num_samples: Samples scored.
        by_class: That share of each class that occurs, by label.
        is_task_known: Whether each sample was asked with the classes of its experience.
    """

    accuracy: float
    mean_class_accuracy: float
    num_samples: int
    by_class: dict[int, float]
    is_task_known: bool


def score(
    learner: Learner, samples: Samples, *, batch_size: int = 256, progress: Callable[[int], object] | None = None
) -> StreamScores:
    """Returns how often a learner is right.

    Where it has a head for each experience, a sample is asked with the classes of the latest experience that brought
    its class.

    Args:
        learner: The learner.
        samples: Labelled samples.
        batch_size: Samples asked at once.
        progress: Called with the number of samples that are done.

    Raises:
        FitError: A sample is of a class that has no head.
    """
    groups, labels = learner.groups(), samples.labels
    among = {label: group for group in groups for label in group}
    if groups and (unknown := sorted(set(labels.tolist()) - set(among))):
        raise FitError(f"no experience has brought class {unknown[0]}, so no head can answer for it")
    right, done = torch.zeros(len(labels), dtype=torch.bool), 0
    asked = [tuple(among[label]) for label in labels.tolist()] if groups else [()] * len(labels)
    for group in dict.fromkeys(asked):
        rows = torch.tensor([row for row, own in enumerate(asked) if own == group])
        for part in rows.split(batch_size):
            x, y = samples.batch(part)
            right[part] = learner.predict(x, group or None) == y
            done += len(part)
            if progress is not None:
                progress(done)
    by_class = {int(label): _share(right[labels == label]) for label in labels.unique()}
    mean = sum(by_class.values()) / len(by_class)
    return StreamScores(_share(right), mean, len(labels), by_class, bool(groups))


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def classify(
    learner: Learner,
    images: Sequence[Callable[[], Image.Image]],
    among: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[int]:
    """Returns the label of each image; -1 where nothing is known yet.

    Args:
        learner: A learner of images.
        images: What opens each.
        among: Labels to choose from; None for all met so far.
        batch_size: Images asked at once.
        progress: Called with the number of images that are done.

    Raises:
        FitError: Heads of different experiences would have to be compared.
    """
    transform, found = transform_of(learner), []
    for start in range(0, len(images), batch_size):
        pixels = [transform.pixels(opened()) for opened in images[start : start + batch_size]]
        found += learner.predict(torch.stack(pixels), among).tolist()
        if progress is not None:
            progress(len(found))
    return found


def labels_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Returns the labels of classes by their names.

    Raises:
        TaskError: One is not among them.
    """
    asked = [name.strip() for name in names]
    if unknown := [name for name in asked if name not in classes]:
        raise TaskError(f"no class is called {unknown[0]!r}{nearest(unknown[0], classes)}: there are {len(classes)}")
    return [list(classes).index(name) for name in asked]
