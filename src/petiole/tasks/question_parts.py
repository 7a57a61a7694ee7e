"""What readers of questions share: fields of JSON objects, image files, options, and how a split is cut."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import TaskError
from .images import Files
from .question import Metric, Question, QuestionTask
from .splits import CUT
from .task import Images

T = TypeVar("T")
_KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object"}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        TaskError: The file is missing or damaged, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise TaskError(f"{path} holds {type(found).__name__}, where an object {{...}} was looked for")
    return found


def field(row: Any, key: str, kind: type[T], where: str) -> T:
    """Returns a field of a JSON object.

    Args:
        row: The object.
        key: The field's name.
        kind: What it must be: str, int, list or dict.
        where: Where the object stands, for messages.

    Raises:
        TaskError: There is no object, no such field, or it is of another kind.
    """
    if not isinstance(row, dict):
        raise TaskError(f"{where} is {row!r}, where an object {{...}} was looked for")
    if key not in row:
        raise TaskError(f"{where} has no {key!r}: it has {', '.join(row) or 'nothing'}")
    if type(row[key]) is not kind:  # true is an int to isinstance
        raise TaskError(f"{where} has {key} {row[key]!r}: it must be {_KINDS[kind]}")
    return row[key]


def optional(row: dict[str, Any], key: str, where: str) -> str:
    """Returns a string that may be absent or null, then as an empty one."""
    return "" if row.get(key) is None else field(row, key, str, where)


def first_folder(*places: Path) -> Path:
    """Returns the first folder that exists, or else the first of all, so that a message names it."""
    return next((place for place in places if place.is_dir()), places[0])


def lettered(options: Sequence[str]) -> str:
    """Returns options as a prompt shows them.

    Example:
        >>> lettered(["red", "blue"])
        '(A) red (B) blue'
    """
    return " ".join(f"({letter(i)}) {option}" for i, option in enumerate(options))


def letter(index: int) -> str:
    """Returns the letter of an option, A for 0."""
    return chr(ord("A") + index)


class Gallery:
    """Image files, each once, in the order in which questions ask for them."""

    def __init__(self) -> None:
        self._places: dict[Path, int] = {}

    def place(self, path: Path) -> int:
        """Returns where an image stands."""
        return self._places.setdefault(path, len(self._places))

    def files(self) -> Files:
        """Returns the images.

        Raises:
            TaskError: Files are missing; names the first and says how many.
        """
        paths = list(self._places)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise TaskError(
                f"there is no image {missing[0]}, and {len(missing)} of {len(paths)} images are missing in all: "
                "add them, or say where they are with images="
            )
        return Files(paths)


def question_task(
    name: str,
    images: Images,
    metric: Metric,
    seed: int,
    *,
    train: Sequence[Question] = (),
    val: Sequence[Question] = (),
    test: Sequence[Question] = (),
) -> QuestionTask:
    """Returns a task from the splits of a source; without val, a fifth of the training images becomes val."""
    if not val:
        train, val = cut_off(train, seed)
    train, val, test = tuple(train), tuple(val), tuple(test)
    return QuestionTask(name, images, train or None, val or None, test or None, metric)


def cut_off(questions: Sequence[Question], seed: int) -> tuple[list[Question], list[Question]]:
    """Returns questions without those of a seeded fifth of their images, and those of that fifth.

    Images that a question shows together stay together, so that none is on both sides. A question without image counts
    as an image of its own.
    """
    groups = _groups(questions)
    names = np.unique(groups)
    cut = np.random.default_rng(seed).permutation(names)[: round(CUT * len(names))]
    is_cut = np.isin(groups, cut).tolist()
    keep = [question for question, is_gone in zip(questions, is_cut, strict=True) if not is_gone]
    return keep, [question for question, is_gone in zip(questions, is_cut, strict=True) if is_gone]


def _groups(questions: Sequence[Question]) -> NDArray[np.int64]:
    """Returns a number per question, the same for those whose images are linked by questions (union-find)."""
    parents: dict[int, int] = {}

    def root(image: int) -> int:
        while parents.setdefault(image, image) != image:
            parents[image] = image = parents[parents[image]]
        return image

    for question in questions:
        for image in question.images[1:]:
            parents[root(image)] = root(question.images[0])
    # questions without image get numbers below 0, which no image has
    return np.array([root(q.images[0]) if q.images else -1 - i for i, q in enumerate(questions)], np.int64)
