"""Image classification datasets of Hugging Face `datasets`, from the hub or from disk."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import TaskError
from .images import decode
from .splits import split_task, whole_task
from .task import Split, Task

_VAL_NAMES = ("validation", "val", "valid", "dev")
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label", "class")


def read_hub(source: str, seed: int) -> Task:
    """Returns the task in a dataset of the hub or in one that was saved by `save_to_disk`.

    Takes the image column (`image` where there are several) and the label column (`label`, `labels`, `fine_label`,
    `class`, otherwise the only one of class labels); labels may be class labels, integers from 0 or strings. A
    validation or test split whose labels are all -1 is unlabelled and left out. Without any split but train, a
    stratified fifth becomes test; without validation, a fifth of the rest becomes val.

    Args:
        source: `owner/name`, `owner/name:config` or a folder.
        seed: Who is cut.

    Raises:
        TaskError: `datasets` is not installed, the dataset cannot be had, or it has no such column or train split.
    """
    splits = _load(source)
    name = Path(source).expanduser().resolve().name.replace(":", "-")
    if "train" not in splits:
        raise TaskError(f"hf:{source} has no train split: it has {', '.join(splits)}")
    image, label = _columns(source, splits["train"].features)
    labels = {key: _labels(part, label) for key, part in splits.items()}
    classes, coded = _classes(source, splits["train"].features[label], labels)
    val = next((key for key in _VAL_NAMES if key in splits), None)
    test = "test" if "test" in splits else None

    def split(key: str | None) -> Split | None:
        if key is None or (key != "train" and len(coded[key]) and (coded[key] == -1).all()):
            return None
        return Split(_Rows(splits[key], image, f"hf:{source}, {key}"), coded[key])

    train = split("train")
    assert train is not None
    if val is None and test is None:
        return whole_task(name, classes, train, seed)
    return split_task(name, classes, train, split(val), split(test), seed)


class _Rows:
    """The image column of a dataset, decoded by our own rules."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        import datasets

        self.rows = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.name = column, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Image.Image:
        value = self.rows[int(index)][self.column]
        if value is None:
            raise TaskError("the row has no image")
        if value["bytes"] is not None:
            return decode(io.BytesIO(value["bytes"]))
        with open(value["path"], "rb") as file:
            return decode(file)

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


def _load(source: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise TaskError("Hugging Face datasets need the library: pip install 'petiole[data]'") from error
    path = Path(source).expanduser()
    is_local = path.exists() or source.startswith(("/", ".", "~"))
    owner_name, _, config = source.partition(":")
    try:
        found = datasets.load_from_disk(str(path)) if is_local else datasets.load_dataset(owner_name, config or None)
    except Exception as error:  # whatever the network, the hub, a script or a file has to say
        what = "loaded as a folder written by save_to_disk" if is_local else "loaded from the Hugging Face hub"
        raise TaskError(f"hf:{source} cannot be {what}: {error}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _columns(source: str, features: Any) -> tuple[str, str]:
    """Names of the image and of the label column."""
    import datasets

    images = [key for key, value in features.items() if isinstance(value, datasets.Image)]
    labels = [key for key, value in features.items() if isinstance(value, datasets.ClassLabel)]
    image = _choice(_IMAGE_NAMES, images, images)
    label = _choice(_LABEL_NAMES, features, labels)
    if image is None or label is None:
        what = "image column" if image is None else "label column"
        known = _IMAGE_NAMES if image is None else _LABEL_NAMES
        raise TaskError(
            f"hf:{source} has no {what} to choose: its columns are {', '.join(features)}. "
            f"Call it {known[0]!r} (rename_column, then save_to_disk)"
        )
    return image, label


def _choice(known: tuple[str, ...], names: Any, typed: list[str]) -> str | None:
    return next((name for name in known if name in names), typed[0] if len(typed) == 1 else None)


def _labels(dataset: Any, column: str) -> NDArray[Any]:
    return np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])


def _classes(source: str, feature: Any, labels: dict[str, NDArray[Any]]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Class names, and the labels as integers."""
    kinds = {values.dtype.kind for values in labels.values()}
    if kinds <= set("iu"):
        highest = max(int(values.max(initial=-1)) for values in labels.values())
        names = getattr(feature, "names", None) or [str(c) for c in range(highest + 1)]
        return tuple(names), labels
    if kinds <= set("UO") and all(isinstance(name, str) for values in labels.values() for name in values.tolist()):
        names = sorted(set(np.concatenate(list(labels.values())).tolist()))
        return tuple(names), {key: np.searchsorted(names, values) for key, values in labels.items()}
    raise TaskError(f"hf:{source} has labels that are neither integers nor strings in every row: {feature}")
