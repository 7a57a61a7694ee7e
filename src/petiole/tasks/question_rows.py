"""Questions in rows: a `.jsonl` or `.jsonl.gz` file with an object per line, and images in a pack or in files.

{"image": 17, "question": "how many boxes are there?", "answer": "3", "split": "train"}
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import TaskError
from .images import Packed
from .packs import load_arrays
from .question import Question, QuestionTask
from .question_parts import Gallery, cut_off, field, lettered, question_task
from .task import Images

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MOST_OPTIONS = 26  # letters


def read_rows(path: Path, images: Path | None, seed: int) -> QuestionTask:
    """Returns the task in a file of rows.

    Args:
        path: The file.
        images: A pack, a folder, or None for the file's own folder.
        seed: Which images are cut off where rows have no `split`.

    Raises:
        TaskError: A line is no such row, some rows have a split and others none, or images are missing.
    """
    source: _Source = _Pack(images) if images is not None and images.is_file() else _Folder(images or path.parent)
    parts: dict[str | None, list[Question]] = {}
    for where, row in _rows(path):
        parts.setdefault(_split(row, where), []).append(_question(row, source, where))
        if None in parts and len(parts) > 1:
            raise TaskError(f"{where}: some rows up to here have a split and others none; give one to all or to none")
    if not parts:
        raise TaskError(f"{path} holds no question")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    if None in parts:
        train, test = cut_off(parts[None], seed)
        return question_task(name, source.images(), "exact", seed, train=train, test=test)
    splits = {str(split): questions for split, questions in parts.items()}
    return question_task(name, source.images(), "exact", seed, **splits)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields where each row stands, and the row."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise TaskError(f"{where} cannot be read as JSON: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TaskError(f"{path} is damaged or not a text file in UTF-8: {error}") from error


def _split(row: Any, where: str) -> str | None:
    if not isinstance(row, dict) or row.get("split") is None:
        return None
    split = field(row, "split", str, where)
    if split not in _SPLITS:
        raise TaskError(f"{where} has split {split!r}: it must be train, val or test")
    return _SPLITS[split]


def _question(row: Any, source: "_Source", where: str) -> Question:
    text = field(row, "question", str, where)
    if not text.strip():
        raise TaskError(f"{where} has an empty question")
    options = _strings(row.get("options"), "options", where)
    answer = row.get("answer")
    answers = _strings([answer] if isinstance(answer, str) else answer, "answer", where)
    if options:
        if len(options) > _MOST_OPTIONS:
            raise TaskError(f"{where} has {len(options)} options: they are lettered, so at most {_MOST_OPTIONS}")
        if wrong := [answer for answer in answers if answer not in options]:
            raise TaskError(f"{where} has the answer {wrong[0]!r}, which is none of its options: {', '.join(options)}")
        text = f"{text}\nOptions: {lettered(options)}"
    if "image" not in row:
        raise TaskError(f"{where} has no 'image': it has {', '.join(row)}. Write null for a question without one")
    listed = row["image"] if isinstance(row["image"], list) else [row["image"]]
    images = tuple(source.place(image, where) for image in listed if image is not None)
    name = "" if row.get("id") is None else str(row["id"])
    return Question(text, answers, images, options, name)


def _strings(found: Any, key: str, where: str) -> tuple[str, ...]:
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        kinds = "a string or a list of strings" if key == "answer" else "a list of strings"
        raise TaskError(f"{where} has {key} {found!r}: it must be {kinds}, none of them empty")
    return tuple(found)


class _Source(Protocol):
    """Where the images of rows are."""

    def place(self, image: Any, where: str) -> int:
        """Returns where the image that a row names stands among those of the task."""
        ...

    def images(self) -> Images: ...


class _Folder:
    """Images that rows name by their paths."""

    def __init__(self, root: Path) -> None:
        self.root, self.gallery = root, Gallery()

    def place(self, image: Any, where: str) -> int:
        if not isinstance(image, str):
            raise TaskError(
                f"{where} has image {image!r}: it must be a path below {self.root}; for images by number, pass a pack "
                "as images="
            )
        return self.gallery.place(self.root / image)

    def images(self) -> Images:
        return self.gallery.files()


class _Pack:
    """Images that rows name by their numbers or ids in a pack."""

    def __init__(self, path: Path) -> None:
        arrays = load_arrays(path, ("data", "offsets"), ("ids",))
        self.packed = Packed(arrays["data"], arrays["offsets"], path.name)
        ids = arrays.get("ids", np.empty(0, str)).astype(str).ravel().tolist()
        if "ids" in arrays and not len(self.packed) == len(ids) == len(set(ids)):
            raise TaskError(f"{path} holds {len(self.packed)} images but {len(set(ids))} different ids")
        self.places: dict[Any, int] = {i: i for i in range(len(self.packed))} | {name: i for i, name in enumerate(ids)}
        self.known = f"numbers 0 to {len(self.packed) - 1}" + (f" and ids such as {ids[0]!r}" if ids else "")

    def place(self, image: Any, where: str) -> int:
        if type(image) not in (int, str) or image not in self.places:
            raise TaskError(f"{where} has image {image!r}, which {self.packed.name} does not have: it has {self.known}")
        return self.places[image]

    def images(self) -> Images:
        return self.packed
