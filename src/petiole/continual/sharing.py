"""Which classes, and which of their samples, an experience brings."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import TaskError


def class_order(labels: Tensor, order: int | Sequence[int] | None) -> list[int]:
    """Returns the labels that occur, in the order that was asked for."""
    present = labels.unique().tolist()
    if order is None:
        return present
    if isinstance(order, int):
        shuffled = torch.randperm(len(present), generator=torch.Generator().manual_seed(order))
        return [present[i] for i in shuffled.tolist()]
    wanted = [int(label) for label in order]
    if sorted(wanted) != present:
        odd = sorted(set(wanted) ^ set(present))
        raise TaskError(
            f"order names every class that occurs once: it has {len(wanted)} of {len(present)}"
            + (f", and {odd[0]} is in one of the two only" if odd else "")
        )
    return wanted


def share_out(order: list[int], num_experiences: int, first: int | None) -> list[list[int]]:
    """Returns the classes of each experience."""
    head = [] if first is None else [order[:first]]
    rest, count = order[first or 0 :], num_experiences - len(head)
    if num_experiences < 1 or (first is not None and first < 1) or len(rest) < count or (rest and count < 1):
        begins = "" if first is None else f", {first} of them in the first"
        raise TaskError(f"{len(order)} classes{begins} cannot be shared out among {num_experiences} experiences")
    size, more = divmod(len(rest), count) if count else (0, 0)
    starts = [i * size + min(i, more) for i in range(count + 1)]
    return head + [rest[a:b] for a, b in pairwise(starts)]


def rows_of(labels: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns the rows of each experience: all of a class, or a share where the class returns."""
    present, counts = labels.unique(return_counts=True)
    by_class = labels.argsort(stable=True).split(counts.tolist())
    rows = dict(zip(present.tolist(), by_class, strict=True))
    times = Counter(int(label) for group in groups for label in group)
    for i, group in enumerate(groups):
        if not len(group) or len({int(label) for label in group}) < len(group):
            raise TaskError(f"experience {i} is to bring the classes {list(group)}: name at least one, and each once")
        if absent := [label for label in group if int(label) not in rows]:
            raise TaskError(f"experience {i} is to bring class {absent[0]}, of which there is no training sample")
    if short := [label for label, count in times.items() if count > len(rows[label])]:
        raise TaskError(
            f"class {short[0]} comes {times[short[0]]} times and has {len(rows[short[0]])} training samples"
        )
    shares = {label: iter(rows[label].tensor_split(count)) for label, count in times.items()}
    return [torch.cat([next(shares[int(label)]) for label in group]).sort().values for group in groups]
