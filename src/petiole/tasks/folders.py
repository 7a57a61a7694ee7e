"""Image folders: one folder per class, with or without train, val and test parts above them."""

from pathlib import Path

import numpy as np

from ..errors import TaskError
from .images import SUFFIXES, Files, contents, find_images, is_visible
from .splits import split_task, whole_task
from .task import Split, Task

_PARTS = (("train",), ("val", "valid", "validation"), ("test",))


def read_folder(root: Path, seed: int) -> Task:
    """Returns the task in `root/<class>/**` or in `root/train|val|test/<class>/**`.

    Classes and files are in sorted order; hidden and other files are left out; `valid` and `validation` also name the
    val part. Without parts, a stratified fifth becomes test; without val, a fifth of the rest becomes val.

    Raises:
        TaskError: No class folder, a class without training images, or a part named twice.
    """
    train, val, test = (_part(root, names) for names in _PARTS)
    name = root.resolve().name
    if train is None:
        if other := val or test:
            raise TaskError(f"{root} has a {other.name} folder but no train folder: add train/<class>/<image>")
        classes = _classes(root)
        return whole_task(name, classes, _train(root, classes), seed)
    classes = _classes(train)
    return split_task(name, classes, _train(train, classes), _held_out(val, classes), _held_out(test, classes), seed)


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The part's folder. A folder of that name with no folder inside is a class: trains, among buses and trams."""
    paths = [root / name for name in names if (root / name).is_dir() and _folders(root / name)]
    if len(paths) > 1:
        raise TaskError(f"{root} has both a {paths[0].name} and a {paths[1].name} folder: keep one of them")
    return paths[0] if paths else None


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and is_visible(path.name))


def _classes(root: Path) -> tuple[str, ...]:
    classes = tuple(_folders(root))
    if not classes:
        raise TaskError(
            f"{root} holds {len(find_images(root)) or 'no'} images and no class folder: an image folder is laid out as "
            "<class>/<image> or train/<class>/<image>; a VTAB folder has train800.txt"
        )
    return classes


def _train(root: Path, classes: tuple[str, ...]) -> Split:
    found = [find_images(root / name) for name in classes]
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        others = f" ({len(empty)} classes of {len(classes)} are empty)" if len(empty) > 1 else ""
        raise TaskError(
            f"class {empty[0]!r} has no training image: {root / empty[0]} holds {contents(root / empty[0])}{others}. "
            f"Add images ({' '.join(SUFFIXES)}) or remove the folder"
        )
    return _split(found)


def _held_out(root: Path | None, classes: tuple[str, ...]) -> Split | None:
    if root is None:
        return None
    if unknown := [name for name in _folders(root) if name not in classes]:
        raise TaskError(
            f"class {unknown[0]!r} of {root} has no folder in train, which has {', '.join(classes)}: "
            "add training images or remove it"
        )
    found = [find_images(root / name) for name in classes]
    if not any(found):
        raise TaskError(f"{root} holds {contents(root)}: add images or remove the folder")
    return _split(found)


def _split(found: list[list[Path]]) -> Split:
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])
    return Split(Files([path for paths in found for path in paths]), labels)
