"""Labelled images with their splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import TaskError


class Images(Protocol):
    """A sequence of images that are decoded when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image:
        """Returns one image, in any mode; raises what its decoder raises, or a TaskError that gives the reason only."""
        ...

    def describe(self, index: int) -> str:
        """Returns where an image comes from, for messages: a path, or `image 17 of pets.npz`."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Args:
        images: The images.
        labels: Class of each image, int64 `[n]`; any integer type is taken.

    Raises:
        TaskError: No image, labels that are not integers, or another number of labels than of images.
    """

    images: Images
    labels: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or len(labels) != len(self.images):
            raise TaskError(f"{len(self.images)} images need as many labels in one row, got shape {labels.shape}")
        if not len(labels):
            raise TaskError("a split needs at least one image, got none: pass None for a split that does not exist")
        if not np.issubdtype(labels.dtype, np.integer):
            raise TaskError(f"labels must be integers from 0, got {labels.dtype}: {labels[0]!r} first")
        object.__setattr__(self, "labels", labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Sequence[int] | NDArray[np.integer]) -> "Split":
        """Returns the images at these positions, in this order, as a split of their own."""
        rows = np.asarray(indices).astype(np.int64)
        return Split(_Part(self.images, rows), self.labels[rows])


@dataclass(frozen=True, eq=False)
class Task:
    """A classification task: class names and up to three splits.

    Args:
        name: What it is called in tables and files.
        classes: Name of each class; label c belongs to `classes[c]`. A class may be without training images, as in
            VTAB-1k, whose SUN397 has images of 309 of 397 classes; image folders refuse it.
        train: What a plugin is trained on.
        val: What settings are chosen on.
        test: What is reported, once.

    Raises:
        TaskError: No class, a name that stands twice, or a label that is no class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        # one class is little to train a head on, which refuses it, and enough for a learner that knows others
        if not self.classes:
            raise TaskError(f"{self.name} has no class: a task needs at least one")
        if twice := sorted({c for c in self.classes if self.classes.count(c) > 1}):
            raise TaskError(f"{self.name} names the class {twice[0]!r} more than once: class names must differ")
        for part in (self.train, self.val, self.test):
            if part is None:
                continue
            wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(self.classes)))
            if len(wrong):
                i = int(wrong[0])
                raise TaskError(
                    f"{part.images.describe(i)} has label {part.labels[i]}, but {self.name} has {len(self.classes)} "
                    f"classes: labels go from 0 to {len(self.classes) - 1}"
                )

    def joined(self) -> "Task":
        """Returns the task with train and val as one train split: the VTAB protocol's last step."""
        if self.val is None:
            return self
        labels = np.concatenate([self.train.labels, self.val.labels])
        return replace(self, train=Split(Joined([self.train.images, self.val.images]), labels), val=None)


class _Part:
    """Some images of others."""

    def __init__(self, images: Images, indices: NDArray[np.int64]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Image.Image:
        return self.images[int(self.indices[index])]

    def describe(self, index: int) -> str:
        return self.images.describe(int(self.indices[index]))


class Joined:
    """Images of several sources, one after the other."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int, /) -> Image.Image:
        part, index = self._find(index)
        return part[index]

    def describe(self, index: int) -> str:
        part, index = self._find(index)
        return part.describe(index)

    def _find(self, index: int) -> tuple[Images, int]:
        k = int(np.searchsorted(self.ends, index, side="right"))
        if index < 0 or k == len(self.parts):
            raise IndexError(f"image {index} of {len(self)}")
        return self.parts[k], index - (self.ends[k - 1] if k else 0)
