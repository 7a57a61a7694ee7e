"""Heads: classifiers on arrays of features, which learn bit by bit."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FitError
from .growing import positions
from .learner import Learner
from .samples import as_labels
from .streams import Experience

Features = Tensor | NDArray[Any]


class Head(ABC):
    """A classifier on features that learns in parts.

    Its constructor's keyword arguments are its settings, kept under their own names.
    """

    takes_experiences: ClassVar[bool] = False
    """Whether `partial_fit` must be given all samples of an experience at once."""

    def __init__(self) -> None:
        self.classes: list[int] = []
        self.d_in: int | None = None

    @abstractmethod
    def partial_fit(self, features: Features, labels: Features | Sequence[int]) -> Self:
        """Learns from more samples, and returns itself.

        Args:
            features: `[n, d]`.
            labels: Integers from 0 `[n]`.

        Raises:
            FitError: The samples do not fit each other or those before, or are not finite.
            TaskError: The labels are no integers from 0 in one row.
        """

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """Returns how much speaks for each class `[n, C]`, in the order of `classes`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns all that it has learnt and all its generators, as `Learner.state` does."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned."""

    @torch.no_grad()
    def predict(self, features: Features, among: Sequence[int] | None = None) -> Tensor:
        """Returns the label of each row `[n]`, int64 on the CPU; -1 where no class is known.

        Args:
            features: `[n, d]`.
            among: Labels to choose from; None for all that were learnt.

        Raises:
            FitError: The features have another width than those that it learnt from.
        """
        x = _tensor(features)
        if x.ndim != 2 or x.shape[1] != (self.d_in or x.shape[1]):
            width = "d" if self.d_in is None else self.d_in
            raise FitError(f"the head answers features [n, {width}], got {list(x.shape)}")
        if not self.classes:
            return torch.full((len(x),), -1)
        return choose(self.scores(x), self.classes, among)


class HeadLearner(Learner):
    """A head on a stream, behind a frozen feature extractor or on features themselves.

    Args:
        head: The head.
        extract: From inputs as the stream gives them to features `[B, d]`, e.g. `Extractor(model)`; None where the
            stream's inputs are features already.
    """

    def __init__(self, head: Head, *, extract: Callable[[Tensor], Tensor] | None = None) -> None:
        self.head, self.extract = head, extract
        self.needs_boundaries = head.takes_experiences  # type: ignore[misc]
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def begin(self, experience: Experience) -> None:
        if self.head.takes_experiences and experience.epochs != 1:
            raise FitError(
                f"{type(self.head).__name__} makes its own epochs over the samples of an experience: the stream must "
                f"bring them once, it has epochs={experience.epochs}"
            )

    def observe(self, x: Tensor, y: Tensor) -> None:
        features = self._features(x)
        if self.head.takes_experiences:
            self.waiting.append((features, y))
        else:
            self.head.partial_fit(features, y)

    def end(self, experience: Experience) -> None:
        if self.waiting:
            self.head.partial_fit(torch.cat([x for x, _ in self.waiting]), torch.cat([y for _, y in self.waiting]))
            self.waiting = []

    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        return self.head.predict(self._features(x), among)

    def state(self) -> dict[str, Any]:
        waiting = {str(i): {"x": x, "y": y} for i, (x, y) in enumerate(self.waiting)}
        return {"head": self.head.state(), "waiting": waiting}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.head.restore(state["head"])
        self.waiting = [(part["x"], part["y"]) for part in state["waiting"].values()]

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return x if self.extract is None else self.extract(x)


def choose(scores: Tensor, classes: Sequence[int], among: Sequence[int] | None) -> Tensor:
    """Returns the label with the highest score in each row `[n]`, int64 on the CPU.

    Args:
        scores: `[n, C]`.
        classes: Label of each column.
        among: Labels to choose from; None for all. Where none of them is a class, the answer is -1.
    """
    labels = torch.tensor(list(classes), dtype=torch.int64)
    if among is not None:
        columns = positions(classes, torch.tensor(sorted(set(among)), dtype=torch.int64))
        columns = columns[columns >= 0]
        scores, labels = scores[:, columns.to(scores.device)], labels[columns]
    if not len(labels):
        return torch.full((len(scores),), -1)
    return labels[scores.argmax(1).cpu()]


def checked(features: Features, labels: Features | Sequence[int], d: int | None) -> tuple[Tensor, Tensor]:
    """Returns features `[n, d]`, floating, and labels `[n]` on their device.

    Args:
        features: What was given.
        labels: What was given.
        d: Width of the features before; None where there were none.

    Raises:
        FitError: They do not fit each other or those before, or are not finite.
        TaskError: The labels are no integers from 0 in one row.
    """
    x, y = _tensor(features), as_labels(labels)
    if x.ndim != 2 or len(x) != len(y):
        raise FitError(f"a head takes features [n, d] and labels [n], got {list(x.shape)} and {list(y.shape)}")
    if d is not None and x.shape[1] != d:
        raise FitError(f"the head has learnt from features of width {d}, these have {x.shape[1]}")
    if not torch.isfinite(x).all():
        raise FitError("a feature is not finite: look at the images and at the backbone's precision")
    return (x if x.is_floating_point() else x.float()), y.to(x.device)


def _tensor(features: Features) -> Tensor:
    """Returns features as a tensor without a graph; of arrays, a copy of those that torch cannot share memory with."""
    if isinstance(features, np.ndarray):
        features = np.require(features, requirements=("C", "W"))
    return torch.as_tensor(features).detach()
