"""Streams: samples in the order in which a learner meets them, cut into experiences.

class-incremental    new classes in each experience; tested on those met so far
domain-incremental   the same classes from another source in each experience
smooth               classes come and go without boundaries; experiences are only points where scores are taken
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TaskError
from ..tasks.task import Task
from ..tasks.transform import Transform
from .samples import Part, Samples, as_samples, of_classes
from .sharing import class_order, rows_of, share_out


@dataclass(frozen=True, eq=False)
class Experience:
    """A stretch of a stream.

    Args:
        index: Its place in the stream, from 0.
        classes: Labels that occur in its training samples, in rising order.
        train: What is learnt from.
        test: What is scored; None where the stream has no test samples.
        batch_size: Samples a step; the last step of an epoch may have fewer.
        epochs: Passes over the training samples; 1 is online learning.
        seed: Seed of the order; None keeps the order of `train`.
    """

    index: int
    classes: tuple[int, ...]
    train: Part
    test: Part | None
    batch_size: int
    epochs: int
    seed: int | None

    @property
    def num_steps(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self._per_epoch

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs `[B, ...]` and labels `[B]` of each step, in an order that depends on the seed alone.

        Args:
            start: Steps to leave out, for a learner that goes on.
        """
        for step in range(start, self.num_steps):
            epoch, place = divmod(step, self._per_epoch)
            if place == 0 or step == start:
                order, train = self._order(epoch), self.train.drawn((self.seed or 0, self.index, epoch))
            yield train.batch(order[place * self.batch_size : (place + 1) * self.batch_size])

    @property
    def _per_epoch(self) -> int:
        return -(-len(self.train) // self.batch_size)

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(len(self.train))
        # one generator an epoch: whoever goes on in the middle needs no state of an earlier one
        generator = np.random.default_rng((self.seed, self.index, epoch))
        return torch.from_numpy(generator.permutation(len(self.train)))


@dataclass(frozen=True, eq=False)
class Stream:
    """Experiences one after the other.

    Args:
        experiences: They, in order.
        classes: Name of each class; label c belongs to `classes[c]`.
        has_boundaries: Whether a learner is told where an experience begins and ends.
        test: All test samples, for scores class by class; None where there are none.
    """

    experiences: tuple[Experience, ...]
    classes: tuple[str, ...]
    has_boundaries: bool = True
    test: Samples | None = None

    def __len__(self) -> int:
        return len(self.experiences)

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]


def class_incremental(
    train: Any,
    test: Any = None,
    *,
    num_experiences: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    first: int | None = None,
    order: int | Sequence[int] | None = None,
    batch_size: int = 32,
    epochs: int = 1,
    seed: int = 0,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
) -> Stream:
    """Returns a stream that brings new classes in each experience.

    Args:
        train: A `Task`, whose train and test it takes; or samples as `as_samples` takes them: `(inputs, labels)`, a
            map-style dataset, images with labels.
        test: Samples to score on, where `train` is no task; None scores nothing.
        num_experiences: How many; with equal numbers of classes, or one more in the first ones.
        groups: Labels of each experience instead. A label that stands in several experiences returns: its training
            samples are shared out among them in their order. Labels that stand nowhere are left out, in test too.
        first: Classes of the first experience; the others share out the rest.
        order: Order of the classes: None as numbered, a seed, or all labels in order.
        batch_size: Samples a step.
        epochs: Passes over the samples of an experience; 1 is online learning.
        seed: Seed of the order of samples.
        transform: How images become pixels.
        classes: Name of each class; None for those of the task or of the dataset, or else their numbers.

    Raises:
        TaskError: The classes cannot be shared out so, an experience has no training sample, or a test label never
            occurs in training.

    Example:
        >>> import torch
        >>> stream = class_incremental((torch.randn(40, 8), torch.arange(40) % 10), num_experiences=5)
        >>> [experience.classes for experience in stream][:2]
        [(0, 1), (2, 3)]
    """
    samples, tests, names = _read(train, test, transform, classes)
    if (groups is None) == (num_experiences is None):
        raise TaskError("a stream needs num_experiences or groups, one of the two")
    if groups is None:
        assert num_experiences is not None
        groups = share_out(class_order(samples.labels, order), num_experiences, first)
    elif order is not None or first is not None:
        raise TaskError("groups say which classes each experience brings: order and first say it again")
    return _stream(samples, tests, names, rows_of(samples.labels, groups), batch_size, epochs, seed)


def domain_incremental(
    domains: Sequence[Any],
    tests: Sequence[Any] | None = None,
    *,
    batch_size: int = 32,
    epochs: int = 1,
    seed: int = 0,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
) -> Stream:
    """Returns a stream that brings the same classes from another source in each experience.

    Args:
        domains: A `Task` for each experience, or samples; all of the same classes.
        tests: Samples to score each on, where domains are no tasks.
        batch_size: Samples a step.
        epochs: Passes over the samples of an experience; 1 is online learning.
        seed: Seed of the order of samples.
        transform: How images become pixels.
        classes: As of `class_incremental`.

    Raises:
        TaskError: The domains name their classes differently, or a test label never occurs in training.
    """
    if tests is not None and len(tests) != len(domains):
        raise TaskError(f"{len(domains)} domains need as many tests, got {len(tests)}")
    if not domains:
        raise TaskError("a stream needs at least one domain, got none")
    read = [_read(d, None if tests is None else tests[i], transform, classes) for i, d in enumerate(domains)]
    names = max((names for _, _, names in read), key=len)
    for i, (_, _, own) in enumerate(read):
        if odd := [c for c, name in enumerate(own) if name != names[c]]:
            raise TaskError(f"class {odd[0]} is {own[odd[0]]!r} in domain {i} and {names[odd[0]]!r} in another one")
    known, experiences = torch.cat([samples.labels for samples, _, _ in read]), []
    for i, (samples, test, _) in enumerate(read):
        if test is not None:
            _check_known(test, known)
        part = None if test is None else Part(test, torch.arange(len(test)))
        experiences.append(_experience(i, samples, torch.arange(len(samples)), part, batch_size, epochs, seed))
    return Stream(tuple(experiences), names)


def smooth(
    train: Any,
    test: Any = None,
    *,
    sigma: float = 0.1,
    num_checkpoints: int = 10,
    order: int | Sequence[int] | None = None,
    batch_size: int = 10,
    seed: int = 0,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
) -> Stream:
    """Returns a task-free stream: classes come and go smoothly, in one pass, and nobody says where one ends.

    Each class has its centre on the time axis, evenly spaced; a sample comes at the centre of its class plus Gaussian
    noise. Experiences are equal stretches, behind each of which scores are taken.

    Source: after Shen et al., 2022, arXiv 2205.09347, which evaluates on such streams; the formula is ours.

    Args:
        train: As of `class_incremental`.
        test: As of `class_incremental`.
        sigma: Standard deviation of the noise, as a share of the stream: 0 brings class by class, far above 1 shuffles.
        num_checkpoints: Stretches after which scores are taken.
        order: As of `class_incremental`.
        batch_size: Samples a step.
        seed: Seed of the noise.
        transform: How images become pixels.
        classes: As of `class_incremental`.

    Raises:
        TaskError: The settings or the samples do not make a stream.
    """
    samples, tests, names = _read(train, test, transform, classes)
    if not 0 <= sigma < math.inf:
        raise TaskError(f"sigma is 0 or more, got {sigma}")
    if not 1 <= num_checkpoints <= len(samples):
        raise TaskError(f"{num_checkpoints} checkpoints do not fit {len(samples)} samples: at least one sample each")
    ordered = class_order(samples.labels, order)
    centres = torch.zeros(max(ordered) + 1, dtype=torch.float64)
    centres[ordered] = torch.arange(len(ordered), dtype=torch.float64) / len(ordered)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(samples), generator=generator, dtype=torch.float64)
    # a seeded shuffle first: with little noise, samples of a class do not come in the order of their files
    shuffled = torch.randperm(len(samples), generator=generator)
    times = (centres[samples.labels] + sigma * noise)[shuffled]
    rows = list(shuffled[times.argsort(stable=True)].tensor_split(num_checkpoints))
    return replace(_stream(samples, tests, names, rows, batch_size, 1, None), has_boundaries=False)


def _read(
    train: Any, test: Any, transform: Transform | None, classes: Sequence[str] | None
) -> tuple[Samples, Samples | None, tuple[str, ...]]:
    """Returns training samples, test samples and class names."""
    if isinstance(train, Task):
        if test is not None or classes is not None:
            raise TaskError(f"{train.name} has test images and class names of its own: give the task alone")
        samples = as_samples(train.train, transform)
        return samples, None if train.test is None else as_samples(train.test, transform), train.classes
    samples = as_samples(train, transform)
    if not len(samples):
        raise TaskError("a stream needs at least one training sample, got none")
    known, num_classes = classes or getattr(train, "classes", None), int(samples.labels.max()) + 1
    names = tuple(map(str, known if isinstance(known, list | tuple) else range(num_classes)))
    if len(names) < num_classes:
        raise TaskError(f"{len(names)} class names do not do for labels from 0 to {num_classes - 1}")
    return samples, None if test is None else as_samples(test, transform), names


def _stream(
    train: Samples,
    test: Samples | None,
    names: tuple[str, ...],
    rows: Sequence[Tensor],
    batch_size: int,
    epochs: int,
    seed: int | None,
) -> Stream:
    if not rows:
        raise TaskError("a stream needs at least one experience, got none")
    if test is not None:
        _check_known(test, train.labels)
        # classes that no experience brings are not asked for
        test = of_classes(test, train.labels[torch.cat(list(rows))])
    experiences = []
    for i, own in enumerate(rows):
        part = None if test is None else of_classes(test, train.labels[own])
        experiences.append(_experience(i, train, own, part, batch_size, epochs, seed))
    return Stream(tuple(experiences), names, test=test)


def _check_known(test: Samples, labels: Tensor) -> None:
    if unknown := sorted(set(test.labels.unique().tolist()) - set(labels.unique().tolist())):
        raise TaskError(f"label {unknown[0]} occurs in test and never in training: leave its samples out")


def _experience(
    index: int, train: Samples, rows: Tensor, test: Part | None, batch_size: int, epochs: int, seed: int | None
) -> Experience:
    if not len(rows):
        raise TaskError(f"experience {index} has no training sample")
    if batch_size < 1 or epochs < 1 or (seed is not None and seed < 0):
        raise TaskError(f"batch_size and epochs are at least 1, seed at least 0: got {batch_size}, {epochs} and {seed}")
    classes = tuple(train.labels[rows].unique().tolist())
    return Experience(index, classes, Part(train, rows), test, batch_size, epochs, seed)
