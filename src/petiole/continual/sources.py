"""A task's images as a learner takes them: features that are computed once, or pixels."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import PluginFileError
from ..tasks.cache import Pixels
from ..tasks.task import Split, Task
from ..tasks.transform import Transform
from .features import Extractor, cache_features
from .heads import HeadLearner
from .learner import Learner
from .parts import describe, input_config
from .samples import Part, Samples


def transform_of(learner: Learner) -> Transform:
    """Returns how images become a learner's input.

    Raises:
        PluginFileError: It takes no images, or does not say how.
    """
    config = input_config(describe(learner)[0])
    if config is None:
        raise PluginFileError("the learner does not say how images become its input: give it samples that are ready")
    return Transform(config)


def samples_of(
    learner: Learner,
    images: Split,
    *,
    folder: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Samples:
    """Returns images as a learner takes them.

    Args:
        learner: Stands on features of a frozen model, or takes pixels.
        images: Images and labels.
        folder: Where features are kept for the next time; None keeps none.
        progress: Called with the number of images done and in all.

    Raises:
        TaskError: An image cannot be read.
    """
    if isinstance(learner, HeadLearner) and isinstance(learner.extract, Extractor):
        extract = learner.extract
        return cache_features(extract.model, images, dtype=extract.dtype, folder=folder, progress=progress)
    return Pixels(images, transform_of(learner), progress=progress)


def parted(samples: Samples, task: Task) -> tuple[Samples, Samples | None]:
    """Returns those of `task.joined().train` that come from its train split, and those from its val split.

    Args:
        samples: What `samples_of` returned for the joined split.
        task: The task before it was joined.
    """
    rows, num = torch.arange(len(samples)), len(task.train)
    return Part(samples, rows[:num]), None if task.val is None else Part(samples, rows[num:])
