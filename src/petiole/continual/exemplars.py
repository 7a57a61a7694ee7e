"""Exemplars: samples that are kept to be learnt from again, and which of all samples they are.

Reservoir       every sample seen is kept with the same probability
ClassBalanced   classes share the room equally, and within a class every sample is kept with the same probability
Ring            classes share the room equally, and the last samples of each are kept
Herding         classes share the room equally, and samples are kept whose mean feature is near that of their class
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .store import ByClass, Exemplars

__all__ = ["ClassBalanced", "Exemplars", "Herding", "Reservoir", "Ring"]


class Reservoir(Exemplars):
    """Every sample that was ever seen is an exemplar with the same probability.

    Source: Vitter, 1985, "Random Sampling with a Reservoir", algorithm R: item n takes slot j, uniform over its own
    n + 1 numbers from 0, if that is a slot.

    Args:
        capacity: Exemplars at most.
        seed: As of `Exemplars`.
        device: As of `Exemplars`.

    Example:
        >>> import torch
        >>> exemplars = Reservoir(20)
        >>> for x, y in zip(torch.randn(10, 32, 8), torch.arange(320).view(10, 32) % 5):
        ...     exemplars.add(x, y)
        >>> x, y = exemplars.sample(16)
        >>> x.shape
        torch.Size([16, 8])
    """

    capacity: int

    def __init__(self, capacity: int, *, seed: int = 0, device: str | torch.device | None = None) -> None:
        super().__init__(capacity, seed=seed, device=device)
        self._seen = 0

    def _place(self, x: Tensor, labels: Sequence[int]) -> dict[int, int]:
        places: dict[int, int] = {}
        for item, draw in enumerate(self._uniform(len(labels))):
            self._seen += 1
            slot = self._new_slot() if self._size < self.capacity else int(draw * self._seen)
            if slot < self.capacity:
                places[slot] = item
        return places

    def _room(self) -> int:
        return self.capacity

    def _policy(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def _restore_policy(self, state: Mapping[str, Any]) -> None:
        self._seen = int(state["seen"])


class ClassBalanced(ByClass):
    """Classes share the room equally, and every sample of a class is an exemplar with the same probability.

    When classes come, the largest give up exemplars that are chosen uniformly.

    Source: Chrysakis and Moens, 2020, "Online Continual Learning from Imbalanced Data", class-balancing reservoir
    sampling.

    Args:
        capacity: Exemplars at most in all; None with `per_class`.
        per_class: Exemplars at most of each class, instead.
        seed: As of `Exemplars`.
        device: As of `Exemplars`.

    Differs from the paper: a class may ask for a slot of the largest only while that has at least two more.
    """

    def _place(self, x: Tensor, labels: Sequence[int]) -> dict[int, int]:
        self._meet(labels)
        places: dict[int, int] = {}
        for item, (label, draw) in enumerate(zip(labels, self._uniform(len(labels)), strict=True)):
            self._seen[label] += 1
            own = self._slots[label]
            donor = self._donor(own)
            place = int(draw * self._seen[label]) if donor is own else len(own)
            if donor is None:
                own.append(self._new_slot())
            elif donor is not own:
                own.append(donor.pop(int(draw * len(donor))))
            if place < len(own):
                places[own[place]] = item
        return places


class Ring(ByClass):
    """Classes share the room equally, and the last samples of each are the exemplars.

    Source: the ring buffer of Lopez-Paz and Ranzato, 2017, arXiv 1706.08840, and Chaudhry et al., 2019, arXiv
    1902.10486.

    Args:
        capacity: Exemplars at most in all; None with `per_class`.
        per_class: Exemplars at most of each class, instead.
        seed: As of `Exemplars`.
        device: As of `Exemplars`.

    Differs from the papers: the number of classes need not be known before; when one comes, the largest give up their
    oldest exemplars.
    """

    def _place(self, x: Tensor, labels: Sequence[int]) -> dict[int, int]:
        self._meet(labels)
        places: dict[int, int] = {}
        for item, label in enumerate(labels):
            self._seen[label] += 1
            own = self._slots[label]
            donor = self._donor(own)
            # oldest first
            own.append(self._new_slot() if donor is None else donor.pop(0))
            places[own[-1]] = item
        return places


class Herding(ByClass):
    """Classes share the room equally, and the mean feature of a class's exemplars is near that of its samples.

    A class is best added whole, in one batch. Where one comes again, its exemplars and the new samples are chosen from
    together; the exemplars then count for all samples of their class before. Nothing is random but what is drawn.

    Source: Rebuffi et al., 2017, "iCaRL: Incremental Classifier and Representation Learning", arXiv 1611.07725,
    algorithms 4 and 5.

    Args:
        capacity: Exemplars at most in all; None with `per_class`.
        per_class: Exemplars at most of each class, instead.
        extract: From samples as they are added to features `[B, d]`, with the weights of that moment; None where
            samples are features.
        seed: As of `Exemplars`.
        device: As of `Exemplars`.

    Differs from the paper: features are scaled to unit length, their mean is not: no mean of exemplars would reach it.
    Classes met first share what is left of a capacity that does not divide, and a class may come more than once.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        per_class: int | None = None,
        extract: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(capacity, per_class=per_class, seed=seed, device=device)
        self.extract = extract

    def _place(self, x: Tensor, labels: Sequence[int]) -> dict[int, int]:
        features = self._features(x)
        self._meet(labels)
        items: dict[int, list[int]] = {label: [] for label in self._slots}
        for item, label in enumerate(labels):
            items[label].append(item)
        shares = self._shares({label: len(own) + len(items[label]) for label, own in self._slots.items()})
        # a class that got nothing new drops its last, any other is chosen anew
        chosen = {
            label: self._choose(label, items[label], features, share) if items[label] else own[:share]
            for (label, own), share in zip(self._slots.items(), shares, strict=True)
        }
        for label in labels:
            self._seen[label] += 1
        return self._assign(chosen)

    def _choose(self, label: int, items: list[int], features: Tensor, share: int) -> list[int]:
        """Returns what a class keeps, in order: slots of exemplars, and items of the batch as `-1 - item`."""
        own, seen = self._slots[label], self._seen[label]
        candidates, counts = features[items], torch.ones(len(items), 1)
        if own:
            stored = self._features(self._columns[0][own]).to(features)
            candidates = torch.cat([stored, candidates])
            counts = torch.cat([torch.full((len(own), 1), seen / len(own)), counts])
        mean = (candidates * counts.to(features)).sum(0) / counts.sum().item()
        references = [*own, *(-1 - item for item in items)]
        return [references[i] for i in herd(candidates, mean, share)]

    def _assign(self, chosen: Mapping[int, list[int]]) -> dict[int, int]:
        """Gives the items of a batch the slots of exemplars that were not chosen, then new ones."""
        kept = {reference for references in chosen.values() for reference in references}
        free = iter([slot for own in self._slots.values() for slot in own if slot not in kept])
        places: dict[int, int] = {}
        for label, references in chosen.items():
            self._slots[label] = slots = []
            for reference in references:
                slot = reference
                if reference < 0:
                    given = next(free, None)
                    slot = self._new_slot() if given is None else given
                    places[slot] = -1 - reference
                slots.append(slot)
        return places

    def _shares(self, available: Mapping[int, int]) -> list[int]:
        """Returns how many exemplars each class gets: as many as it has, down to a level that all share."""
        counts, capacity = list(available.values()), self.capacity
        if capacity is None:
            return [min(count, self.per_class or 0) for count in counts]
        fits = range(capacity + 1)
        level = bisect_right(fits, capacity, key=lambda most: sum(min(count, most) for count in counts)) - 1
        shares = [min(count, level) for count in counts]
        for i, count in enumerate(counts):
            shares[i] += count > level and sum(shares) < capacity
        return shares

    def _features(self, x: Tensor) -> Tensor:
        features = x if self.extract is None else self.extract(x)
        return F.normalize(features.flatten(1).float(), dim=1)


def herd(features: Tensor, mean: Tensor, num: int) -> list[int]:
    """Returns the rows whose running mean follows a mean best, each chosen greedily behind those before.

    Row k minimises `|mean - (sum of the chosen + row) / k|`; ties go to the row in front.

    Args:
        features: `[n, d]`.
        mean: What is to be met `[d]`.
        num: Rows to choose; all there are at most.
    """
    squares, total = features.square().sum(1), torch.zeros_like(mean)
    order: list[int] = []
    for k in range(1, min(num, len(features)) + 1):
        # |k mean - total - row|^2 without what all rows share
        distances = squares - 2 * features @ (k * mean - total)
        distances[order] = torch.inf
        order.append(int(distances.argmin()))
        total = total + features[order[-1]]
    return order
