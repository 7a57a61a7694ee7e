"""How samples become a stream, as one value that a command line, a benchmark or a file can hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TaskError
from ..tasks.transform import Transform
from .samples import as_labels
from .sharing import class_order, share_out
from .streams import Stream, class_incremental, smooth


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How samples are ordered and cut.

    Args:
        num_experiences: Experiences; on a smooth stream, stretches after which scores are taken.
        first: Classes of the first experience; None for as many as in the others.
        order: Seed of the order of the classes; None for the order they are numbered in.
        sigma: How smoothly classes come and go, as of `smooth`; None for experiences with boundaries.
        batch_size: Samples a step.
        epochs: Passes over an experience; 1 is online learning.
        seed: Seed of the order of samples.

    Raises:
        TaskError: A smooth stream is to have what only boundaries give.

    Example:
        >>> import torch
        >>> data = torch.randn(40, 8), torch.arange(40) % 10
        >>> [len(experience.classes) for experience in Plan(num_experiences=2).stream(data)]
        [5, 5]
    """

    num_experiences: int = 5
    first: int | None = None
    order: int | None = None
    sigma: float | None = None
    batch_size: int = 32
    epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sigma is not None and (self.first is not None or self.epochs != 1):
            raise TaskError(
                "a smooth stream passes once and has no first experience of its own: leave first and epochs away"
            )

    @property
    def has_boundaries(self) -> bool:
        """Whether a learner is told where an experience begins and ends."""
        return self.sigma is None

    def labels(self, labels: Sequence[int] | NDArray[np.int64]) -> list[list[int]]:
        """Returns the classes of each experience, of a stream with boundaries, without the samples themselves.

        Args:
            labels: Label of each sample.
        """
        return share_out(class_order(as_labels(labels), self.order), self.num_experiences, self.first)

    def stream(
        self, train: Any, test: Any = None, *, transform: Transform | None = None, classes: Sequence[str] | None = None
    ) -> Stream:
        """Returns samples as a stream.

        Args:
            train: As of `class_incremental`.
            test: As of `class_incremental`.
            transform: As of `class_incremental`.
            classes: As of `class_incremental`.

        Raises:
            TaskError: The samples do not make such a stream.
        """
        shared: dict[str, Any] = {
            "order": self.order,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "transform": transform,
            "classes": classes,
        }
        if self.sigma is not None:
            return smooth(train, test, sigma=self.sigma, num_checkpoints=self.num_experiences, **shared)
        return class_incremental(
            train, test, num_experiences=self.num_experiences, first=self.first, epochs=self.epochs, **shared
        )
