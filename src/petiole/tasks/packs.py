"""Image packs: encoded images, labels and splits in one `.npz` file, without pickle.

data         uint8, encoded images back to back
offsets      int64 [n + 1], where each begins and the last one ends
labels       int [n]
split        uint8 [n], 0 train, 1 val, 2 test; may be absent
class_names  str [C]; may be absent
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TaskError
from .images import Packed
from .splits import split_task, whole_task
from .task import Split, Task

_NEEDED = ("data", "offsets", "labels")
_OPTIONAL = ("split", "class_names")


def read_pack(path: Path, seed: int) -> Task:
    """Returns the task in an image pack.

    Without `split`, a stratified fifth becomes test; without val images, a fifth of the rest becomes val.
    Without `class_names`, classes are called by their numbers. A class may be without training images.

    Raises:
        TaskError: The file is damaged, no image pack, or contradicts itself.
    """
    arrays = load_arrays(path, _NEEDED, _OPTIONAL)
    labels, offsets = arrays["labels"], arrays["offsets"]
    _check(path, arrays)
    images = Split(Packed(arrays["data"], offsets, path.name), labels)
    names = arrays.get("class_names", np.arange(max(int(labels.max()) + 1, 0)).astype(str))
    classes = tuple(str(name) for name in names)
    if "split" not in arrays:
        return whole_task(path.stem, classes, images, seed)
    parts = [np.flatnonzero(arrays["split"] == k) for k in range(3)]
    if not len(parts[0]):
        raise TaskError(f"{path} has no training image: no entry of split is 0")
    train, val, test = (images.part(rows) if len(rows) else None for rows in parts)
    assert train is not None
    return split_task(path.stem, classes, train, val, test, seed)


def load_arrays(path: Path, needed: Sequence[str], optional: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Returns arrays of an image pack, its `data` and `offsets` checked; both must be among those needed.

    Raises:
        TaskError: The file is damaged, lacks a needed array, or `offsets` do not fit `data`.
    """
    arrays = _load(path, needed, optional)
    data, offsets = arrays["data"], arrays["offsets"]
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise TaskError(
            f"{path} is no image pack: data must be uint8 [bytes] and offsets integers [n + 1], "
            f"found {data.dtype} {data.shape} and {offsets.dtype} {offsets.shape}"
        )
    if len(offsets) < 2:
        raise TaskError(f"{path} holds no image: it has {len(offsets)} offsets, one more than images")
    ends = offsets.astype(np.int64)
    if ends[0] != 0 or ends[-1] != len(data) or (np.diff(ends) < 0).any():
        raise TaskError(
            f"{path} is damaged: offsets must rise from 0 to the {len(data)} bytes of data, "
            f"they go from {ends[0]} to {ends[-1]}"
        )
    return arrays


def _load(path: Path, needed: Sequence[str], optional: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        # opened here: numpy leaves a damaged archive open
        with open(path, "rb") as opened:
            file = np.load(opened, allow_pickle=False)
            found = getattr(file, "files", ["a single array"])
            if set(needed) <= set(found):
                return {key: file[key] for key in (*needed, *optional) if key in found}
    except Exception as error:  # the parsers of archive and headers raise almost anything on damaged data
        raise TaskError(f"{path} cannot be read as an image pack: {error}") from error
    raise TaskError(
        f"{path} is no image pack: it holds {', '.join(found) or 'nothing'}; a pack holds {', '.join(needed)} "
        f"and may hold {', '.join(optional)}"
    )


def _check(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    offsets, labels = arrays["offsets"], arrays["labels"]
    for key in ("labels", "split"):
        if key in arrays and arrays[key].shape != (len(offsets) - 1,):
            raise TaskError(f"{path} holds {len(offsets) - 1} images but {key} of shape {arrays[key].shape}")
    if "split" in arrays and not np.isin(arrays["split"], (0, 1, 2)).all():
        raise TaskError(f"{path} has split {np.setdiff1d(arrays['split'], (0, 1, 2))[0]}: 0 train, 1 val, 2 test")
    if labels.dtype.kind not in "iu":
        raise TaskError(f"{path} has labels of type {labels.dtype}: they must be integers from 0")
