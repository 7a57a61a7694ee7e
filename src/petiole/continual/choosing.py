"""Which learner suits a stream: each candidate learns it from training samples and is scored on validation samples."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DivergedError, FitError
from .learner import Learner, run
from .streams import Stream

# from the cheapest: of equally good ones the first is chosen
CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "ncm": {},
    "slda": {},
    "ridge": {},
    "random-ridge": {"num_projections": 2000},
    "er-ace": {},
    "taer": {},
}


@dataclass(frozen=True)
class Tried:
    """A candidate and how it did.

    Args:
        name: The learner.
        settings: What it was made with.
        final_average: Mean accuracy on validation over the experiences, after the last one.
        average_incremental: Mean over time of that accuracy.
        seconds: Time it took to learn [s].
    """

    name: str
    settings: dict[str, Any]
    final_average: float
    average_incremental: float
    seconds: float


def choose(
    candidates: Mapping[str, Mapping[str, Any]],
    make: Callable[[str, Mapping[str, Any]], Learner],
    stream: Stream,
    progress: Callable[[int], object] | None = None,
) -> list[Tried]:
    """Returns the candidates that can learn from a stream, the best first: by the final average accuracy.

    Candidates that need boundaries are left out where there are none, and those whose training diverges.

    Args:
        candidates: Name and settings of each.
        make: From a name and settings to a fresh learner.
        stream: Training samples, with validation samples as test.
        progress: Called with the number of candidates that are done.

    Raises:
        FitError: There are no validation samples, or no candidate is left.

    Example:
        >>> import torch
        >>> from petiole.continual.closed_form import NCM, SLDA
        >>> from petiole.continual.heads import HeadLearner
        >>> from petiole.continual.streams import class_incremental
        >>> data = torch.eye(4).repeat(4, 1), torch.arange(4).repeat(4)
        >>> heads = {"ncm": NCM, "slda": SLDA}
        >>> stream = class_incremental(data, data, num_experiences=2)
        >>> choose(dict.fromkeys(heads, {}), lambda name, s: HeadLearner(heads[name](**s)), stream)[0].name
        'ncm'
    """
    if not any(experience.test is not None and len(experience.test) for experience in stream):
        raise FitError("a learner is chosen on validation samples, and there are none: name one instead of auto")
    tried: list[Tried] = []
    for done, (name, settings) in enumerate(candidates.items(), start=1):
        learner = make(name, settings)
        if stream.has_boundaries or not learner.needs_boundaries:
            tried += _tried(name, settings, learner, stream)
        if progress is not None:
            progress(done)
    if not tried:
        raise FitError(f"none of {', '.join(candidates)} can learn from this stream: name another learner")
    # sorting is stable: of equals, the first stays in front
    return sorted(tried, key=lambda item: -item.final_average)


def _tried(name: str, settings: Mapping[str, Any], learner: Learner, stream: Stream) -> Sequence[Tried]:
    began = time.perf_counter()
    try:
        *_, last = run(stream, learner)
    except DivergedError:
        return ()
    assert last.matrix is not None
    final, average = last.matrix.final_average(), last.matrix.average_incremental()
    return (Tried(name, dict(settings), final, average, time.perf_counter() - began),)
