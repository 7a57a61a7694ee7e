"""What a learner is, and the loop that leads one through a stream."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import FitError
from .matrix import AccuracyMatrix
from .samples import Part, Samples, of_classes
from .streams import Experience, Stream


class Learner(ABC):
    """Learns from a stream, and is a classifier at every moment.

    Its constructor's keyword arguments are its settings, kept under their own names.
    """

    needs_boundaries: ClassVar[bool] = False
    """Whether it must be told where experiences begin and end."""

    def begin(self, experience: Experience) -> None:  # noqa: B027 - many have nothing to prepare
        """Prepares for an experience; not called on streams without boundaries."""

    @abstractmethod
    def observe(self, x: Tensor, y: Tensor) -> None:
        """Learns from one batch.

        Args:
            x: Inputs `[B, ...]`, as the stream's samples give them.
            y: Labels `[B]`, int64.
        """

    def end(self, experience: Experience) -> None:  # noqa: B027 - nor to conclude
        """Concludes an experience; not called on streams without boundaries."""

    @abstractmethod
    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        """Returns the label of each input `[B]`, int64 on the CPU; -1 where nothing is known yet.

        Args:
            x: Inputs `[B, ...]`.
            among: Labels to choose from, where the experience is told (task-incremental); None for all met so far.
        """

    def groups(self) -> Sequence[Sequence[int]]:
        """Returns the classes of each experience where it has a head of its own; nothing where all share one."""
        return ()

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns all that it has learnt and all its generators, so that it can go on exactly.

        A nested dictionary with words as keys; its leaves are tensors or plain values as JSON has them.
        """

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned, of a learner with the same settings."""


@dataclass(frozen=True)
class Event:
    """What happened on the way through a stream.

    Args:
        experience: The experience that it is about.
        step: Steps of the experience that are done.
        num_steps: Steps it has.
        seconds: Time spent in `observe`, `begin` and `end` of this experience so far [s].
        matrix: Accuracies so far, after an experience; None after a step.
    """

    experience: int
    step: int
    num_steps: int
    seconds: float
    matrix: AccuracyMatrix | None = None


def run(
    stream: Stream,
    learner: Learner,
    *,
    is_task_known: bool = False,
    looks_ahead: bool = False,
    matrix: AccuracyMatrix | None = None,
    start: tuple[int, int] = (0, 0),
    test_batch_size: int = 256,
) -> Iterator[Event]:
    """Leads a learner through a stream: yields an event after each step and after each experience.

    The last event's `matrix` is the result. It grows in a new matrix each time; earlier events keep theirs.

    Args:
        stream: The stream.
        learner: The learner; changed in place.
        is_task_known: Whether test samples come with their experience's classes (task-incremental), or all classes met
            so far are in question (class-incremental).
        looks_ahead: Whether to score experiences to come too, for forward transfer.
        matrix: Accuracies so far, for a learner that goes on; None where they are not known.
        start: Experience and step from which a restored learner goes on: as many as it has done.
        test_batch_size: Samples scored at once.

    Raises:
        FitError: The learner needs boundaries, or tasks are to be known, and the stream has none; or the stream has no
            such start.

    Example:
        >>> import torch
        >>> from petiole.continual.closed_form import NCM
        >>> from petiole.continual.heads import HeadLearner
        >>> from petiole.continual.streams import class_incremental
        >>> data = torch.eye(10).repeat(4, 1), torch.arange(10).repeat(4)
        >>> stream = class_incremental(data, data, num_experiences=5)
        >>> *_, last = run(stream, HeadLearner(NCM()))
        >>> last.matrix.final_average()
        1.0
    """
    if learner.needs_boundaries and not stream.has_boundaries:
        raise FitError(f"{type(learner).__name__} must be told where experiences begin and end: this stream has none")
    if is_task_known and not stream.has_boundaries:
        raise FitError("a stream without boundaries has no tasks that could be known")
    first, done = start
    last = stream[first].num_steps if 0 <= first < len(stream) else 0
    if not (0 <= first <= len(stream) and 0 <= done <= last):
        raise FitError(f"there is no step {done} in experience {first} of this stream of {len(stream)} experiences")
    scores = _Scores(stream, is_task_known, looks_ahead, test_batch_size)
    rows = [scores.nothing()] * first if matrix is None else matrix.rows
    if len(rows) != first:
        raise FitError(f"after {first} experiences a matrix has as many rows, this one has {len(rows)}")
    return _lead(stream, learner, scores, rows, start)


def _lead(
    stream: Stream, learner: Learner, scores: "_Scores", rows: list[list[float]], start: tuple[int, int]
) -> Iterator[Event]:
    for experience in stream.experiences[start[0] :]:
        done = start[1] if experience.index == start[0] else 0
        clock = _Clock()
        if stream.has_boundaries and not done:
            clock.add(learner.begin, experience)
        for step, (x, y) in enumerate(experience.batches(done), done + 1):
            clock.add(learner.observe, x, y)
            yield Event(experience.index, step, experience.num_steps, clock.seconds)
        if stream.has_boundaries:
            clock.add(learner.end, experience)
        rows = [*rows, scores.after(experience.index, learner)]
        yield Event(experience.index, experience.num_steps, experience.num_steps, clock.seconds, scores.matrix(rows))


class _Clock:
    """Time spent in calls [s]."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, call: Callable[..., None], *args: Any) -> None:
        began = time.perf_counter()
        call(*args)
        self.seconds += time.perf_counter() - began


class _Scores:
    """Test samples of a stream in columns."""

    def __init__(self, stream: Stream, is_task_known: bool, looks_ahead: bool, batch_size: int) -> None:
        self.looks_ahead, self.batch_size = looks_ahead, batch_size
        self.columns: list[tuple[str, Part, Sequence[int] | None]] = []
        self.met: list[int] = []
        if stream.has_boundaries:
            for experience in stream:
                if experience.test is not None and len(experience.test):
                    among = experience.classes if is_task_known else None
                    self.columns.append((str(experience.index), experience.test, among))
                    self.met.append(experience.index)
        elif stream.test is not None:
            for label in stream.test.labels.unique():
                self.columns.append((stream.classes[label], of_classes(stream.test, label), None))
                self.met.append(next(e.index for e in stream if label in e.classes))

    def matrix(self, rows: list[list[float]]) -> AccuracyMatrix:
        return AccuracyMatrix(
            [name for name, _, _ in self.columns], [len(p) for _, p, _ in self.columns], self.met, rows
        )

    def nothing(self) -> list[float]:
        return [float("nan")] * len(self.columns)

    def after(self, index: int, learner: Learner) -> list[float]:
        """Returns the accuracy of each column after an experience; nan for those that are not scored."""
        is_scored = [self.looks_ahead or met <= index for met in self.met]
        return [
            accuracy(learner, part, among, self.batch_size) if is_wanted else float("nan")
            for (_, part, among), is_wanted in zip(self.columns, is_scored, strict=True)
        ]


def accuracy(learner: Learner, samples: Samples, among: Sequence[int] | None = None, batch_size: int = 256) -> float:
    """Returns the share of samples whose label a learner predicts; nan where there are none."""
    right = 0
    for start in range(0, len(samples), batch_size):
        x, y = samples.batch(range(start, min(start + batch_size, len(samples))))
        right += int((learner.predict(x, among) == y).sum())
    return right / len(samples) if len(samples) else float("nan")
