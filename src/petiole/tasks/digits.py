"""Scikit-learn's handwritten digits: real scans that need no download."""

import numpy as np

from ..errors import TaskError
from .images import Arrays
from .splits import stratified_cut
from .task import Split, Task

_NUM_VAL, _NUM_TEST = 200, 797


def read_digits(seed: int) -> Task:
    """Returns the digits task: 1,797 grey 8x8 scans of 10 classes, stratified by the seed into 800, 200 and 797.

    Source: Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits", UCI; the test part, in scikit-learn.

    Raises:
        TaskError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError("the digits task needs scikit-learn: pip install 'petiole[demo]'") from error
    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    images = Split(Arrays(pixels, "the digits"), scans.target)
    rng = np.random.default_rng(seed)
    keep, test = stratified_cut(images.labels, _NUM_TEST, rng)
    pool = images.part(keep)
    train, val = stratified_cut(pool.labels, _NUM_VAL, rng)
    classes = tuple(str(digit) for digit in range(10))
    return Task("digits", classes, pool.part(train), pool.part(val), images.part(test))
