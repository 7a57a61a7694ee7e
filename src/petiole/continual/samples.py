"""Samples behind indices: what streams cut into experiences, without a copy of any image."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import TaskError
from ..tasks.cache import Pixels
from ..tasks.task import Split
from ..tasks.transform import Transform


@runtime_checkable
class Samples(Protocol):
    """Labelled inputs that are fetched by index; `Pixels` are some."""

    labels: Tensor

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns inputs `[B, ...]` and labels `[B]`, int64."""
        ...


@runtime_checkable
class Varying(Samples, Protocol):
    """Samples that look different each time, e.g. in one of several augmented views."""

    def drawn(self, seed: Sequence[int]) -> Samples:
        """Returns them as they look once; equal seeds give equal looks."""
        ...


class Arrays:
    """Samples that are tensors or numpy arrays already; of a memory map, only what is asked for is read.

    Args:
        inputs: One row a sample `[n, ...]`: features, or images.
        labels: Class of each, integers `[n]`, from 0.

    Raises:
        TaskError: The two do not fit each other, or a label is no class.
    """

    def __init__(self, inputs: Tensor | NDArray[Any], labels: Tensor | NDArray[Any] | Sequence[int]) -> None:
        self.inputs = inputs if isinstance(inputs, Tensor) else np.asarray(inputs)
        self.labels = as_labels(labels)
        if len(self.inputs) != len(self.labels):
            raise TaskError(f"{len(self.inputs)} inputs need as many labels, got {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        found = self.inputs[rows] if isinstance(self.inputs, Tensor) else torch.from_numpy(self.inputs[rows.numpy()])
        return found, self.labels[rows]


class Mapped:
    """Samples of a map-style dataset, whose items are pairs of a tensor and a label.

    Args:
        dataset: Has `__len__` and `__getitem__`. Labels are read from its attribute `targets` or `labels` where there
            is one; otherwise every item is read once.

    Raises:
        TaskError: There are not as many labels as items, or a label is no class.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        known = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
        self.labels = as_labels([int(dataset[i][1]) for i in range(len(dataset))] if known is None else known)
        if len(self.labels) != len(dataset):
            raise TaskError(f"{type(dataset).__name__} has {len(dataset)} items and {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        inputs = [self.dataset[i][0] for i in rows.tolist()]
        if not all(isinstance(item, Tensor) for item in inputs):
            raise TaskError(
                f"an item of {type(self.dataset).__name__} is no tensor but {type(inputs[0]).__name__}: give the "
                "dataset a transform that makes one, e.g. torchvision's ToTensor()"
            )
        return torch.stack(inputs), self.labels[rows]


class Part:
    """Some of other samples, by their indices.

    Args:
        samples: All of them.
        rows: Positions of those that belong to it, in this order, int64 `[n]`.
    """

    def __init__(self, samples: Samples, rows: Tensor) -> None:
        self.samples, self.rows = samples, rows
        self.labels = samples.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.samples.batch(self.rows[torch.as_tensor(indices, dtype=torch.int64)])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all samples in their order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.samples.batch(self.rows[start : start + batch_size])

    def drawn(self, seed: Sequence[int]) -> "Part":
        """Returns the part as it looks once; itself where its samples always look alike."""
        return Part(self.samples.drawn(seed), self.rows) if isinstance(self.samples, Varying) else self


def as_samples(source: Any, transform: Transform | None = None) -> Samples:
    """Returns samples from what users have.

    Args:
        source: Samples, a pair of arrays `(inputs, labels)`, images with labels (`Split`), or a map-style dataset.
        transform: How the images of a `Split` become pixels; nothing else takes one.

    Raises:
        TaskError: It is none of these.
    """
    if isinstance(source, Split):
        if transform is None:
            raise TaskError("images need a transform to become pixels: transform=petiole.Transform(model.input_config)")
        return Pixels(source, transform)
    if isinstance(source, tuple) and len(source) == 2:
        return Arrays(*source)
    if isinstance(source, Samples):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return Mapped(source)
    raise TaskError(
        f"samples are a pair (inputs, labels), images with labels or a map-style dataset, got {type(source).__name__}"
    )


def of_classes(samples: Samples, labels: Tensor) -> Part:
    """Returns the samples of some classes, in their order."""
    return Part(samples, torch.isin(samples.labels, labels).nonzero()[:, 0])


def as_labels(labels: Any) -> Tensor:
    """Returns labels as int64 `[n]` on the CPU.

    Raises:
        TaskError: They are not integers from 0 in one row.
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    # what numpy reads from an empty list is float
    is_whole = np.issubdtype(array.dtype, np.integer) or not array.size
    if array.ndim != 1 or not is_whole:
        raise TaskError(f"labels are integers in one row, got {array.dtype} of shape {list(array.shape)}")
    if array.size and array.min() < 0:
        raise TaskError(f"labels are integers from 0, got {array.min()}")
    return torch.from_numpy(array.astype(np.int64))
