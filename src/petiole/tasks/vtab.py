"""File lists in the layout of VTAB-1k: train800.txt, val200.txt, test.txt, train800val200.txt."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import TaskError
from .images import Files
from .splits import split_task
from .task import Split, Task

TRAIN_LISTS = ("train800.txt", "train800val200.txt")
_LISTS = (*TRAIN_LISTS, "val200.txt", "test.txt")
_CLASS_FILES = ("classes.txt", "labels.txt")


def read_vtab(root: Path, seed: int) -> Task:
    """Returns the task of a folder with VTAB-1k's lists.

    Each line is an image's path relative to the folder, white space (the last on the line, so a path may contain some)
    and a label from 0. train800 is train, val200 val, test test; where train800val200 stands alone, a stratified fifth
    of it becomes val. There are as many classes as `classes.txt` or `labels.txt` names, one per line, otherwise one
    more than the highest label of all lists, called by their numbers. A class may be without training images.

    Raises:
        TaskError: A list that is empty, a line without path or label, a label out of range, or an image that does not
            exist; names list and line.
    """
    lists = {name: _read(root, name) for name in _LISTS if (root / name).is_file()}
    classes = _classes(root, list(lists.values()))
    for part in lists.values():
        part.check(len(classes))
    train = lists.get("train800.txt")
    # train800val200 contains val200, so that beside it val must be cut from its own images
    val = lists.get("val200.txt") if train else None
    test = lists.get("test.txt")
    return split_task(
        root.resolve().name,
        classes,
        (train or lists["train800val200.txt"]).split(),
        None if val is None else val.split(),
        None if test is None else test.split(),
        seed,
    )


@dataclass(frozen=True)
class _List:
    """A list as read: path, label and line number of each image."""

    file: Path
    paths: list[Path]
    labels: list[int]
    lines: list[int]

    def check(self, num_classes: int) -> None:
        for path, label, line in zip(self.paths, self.labels, self.lines, strict=True):
            if not 0 <= label < num_classes:
                raise TaskError(
                    f"{self.file}, line {line}: label {label} is out of range: there are {num_classes} classes, "
                    f"so labels go from 0 to {num_classes - 1}"
                )
            if not path.is_file():
                raise TaskError(f"{self.file}, line {line}: there is no file {path}; paths start at the list's folder")

    def split(self) -> Split:
        return Split(Files(self.paths), np.array(self.labels, np.int64))


def _read(root: Path, name: str) -> _List:
    part = _List(root / name, [], [], [])
    for number, line in enumerate(_lines(part.file), start=1):
        if not line.strip():
            continue
        fields = line.strip().rsplit(None, 1)
        try:
            path, label = fields[0], int(fields[1])
        except (IndexError, ValueError):
            raise TaskError(
                f"{part.file}, line {number}: {line.strip()!r} is not a path, a space and a label (an integer from 0)"
            ) from None
        part.paths.append(root / path)
        part.labels.append(label)
        part.lines.append(number)
    if not part.paths:
        raise TaskError(f"{part.file} lists no image: each line is a path, a space and a label")
    return part


def _classes(root: Path, lists: list[_List]) -> tuple[str, ...]:
    for name in _CLASS_FILES:
        if (root / name).is_file():
            return tuple(line.strip() for line in _lines(root / name) if line.strip())
    return tuple(str(c) for c in range(max(max(part.labels) for part in lists) + 1))


def _lines(file: Path) -> list[str]:
    try:
        # not splitlines(), which also splits at characters that a file name may contain
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not a text file in UTF-8: {error}") from error
