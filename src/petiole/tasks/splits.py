"""How a split is cut from another when a source does not bring it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .task import Split, Task

CUT = 0.2  # part of a split that is cut off when val or test is missing


def stratified_cut(
    labels: NDArray[np.int64], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns which images stay and which are cut off, both sorted, every class in proportion.

    A class never loses its last image, so fewer than `count` are cut where classes are that small.

    Args:
        labels: Classes, `[n]`.
        count: How many to cut off [images].
        rng: Who is cut, and which classes give one more where the proportions do not come out even.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    quotas = np.minimum(sizes * (count / max(len(labels), 1)), sizes - 1)
    shares = np.floor(quotas).astype(np.int64)
    order = np.lexsort((rng.permutation(len(classes)), shares - quotas))  # largest remainder first, ties at random
    while shares.sum() < count and (shares < sizes - 1).any():
        able = order[(shares < sizes - 1)[order]][: count - int(shares.sum())]
        shares[able] += 1
    taken = [rng.permutation(np.flatnonzero(labels == c))[:share] for c, share in zip(classes, shares, strict=True)]
    cut = np.sort(np.concatenate(taken)) if taken else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), cut), cut


def cut_off(split: Split, seed: int) -> tuple[Split, Split | None]:
    """Returns a split without a seeded stratified fifth, and that fifth; None where every class has one image only."""
    keep, cut = stratified_cut(split.labels, round(CUT * len(split)), np.random.default_rng(seed))
    return (split.part(keep), split.part(cut)) if len(cut) else (split, None)


def whole_task(name: str, classes: Sequence[str], images: Split, seed: int) -> Task:
    """Returns a task from a source without splits: a fifth becomes test, a fifth of the rest val."""
    train, test = cut_off(images, seed)
    return split_task(name, classes, train, None, test, seed)


def split_task(
    name: str, classes: Sequence[str], train: Split, val: Split | None, test: Split | None, seed: int
) -> Task:
    """Returns a task from the splits of a source; without val, a fifth of train becomes val."""
    Task(name, tuple(classes), train, val, test)  # complains of labels before they are used for cutting
    if val is None:
        train, val = cut_off(train, seed)
    return Task(name, tuple(classes), train, val, test)
