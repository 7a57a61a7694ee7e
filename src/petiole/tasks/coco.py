"""Questions and captions on the images of COCO: VQAv2, the official captions, and those with Karpathy's splits.

v2_OpenEnded_mscoco_train2014_questions.json   {"questions": [{"image_id", "question", "question_id"}, ...]}
v2_mscoco_train2014_annotations.json           {"annotations": [{"question_id", "answers", "answer_type"}, ...]}

annotations/captions_train2014.json            {"images": [{"id", "file_name"}, ...],
                                                "annotations": [{"image_id", "caption"}, ...]}
dataset_coco.json                              {"images": [{"filepath", "filename", "split", "sentences"}, ...]}

Images lie in `train2014/`, `images/train2014/` or `images/`; a file's name tells its split and year.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import TaskError
from .question import Question, QuestionTask
from .question_parts import Gallery, field, first_folder, optional, question_task, read_json

CAPTION_PROMPT = "Describe the image in one sentence."
_SUBSET = re.compile(r"(train|val|test)(-dev)?(\d{4})?")
_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}

Parts = dict[str, list[Question]]


def read_vqa(root: Path, images: Path | None, seed: int) -> QuestionTask:
    """Returns the task in a folder of VQAv2; tags are answer types. Without annotations, val and test have no answers.

    Source: Goyal et al., 2017, "Making the V in VQA Matter: Elevating the Role of Image Understanding in Visual
    Question Answering", arXiv 1612.00837.

    Args:
        root: The folder with questions and annotations.
        images: Where the images are, None for root.
        seed: Which images are cut off where there is no val part.

    Raises:
        TaskError: A file is damaged, a question without its annotation, or images are missing.
    """
    gallery, parts = Gallery(), Parts()
    labels = _by_part(root.glob("*annotations*.json"))
    for part, file in _by_part(root.glob("*questions*.json")).items():
        subset = _subset(file)
        folder = _folder(images or root, subset)
        answers = _answers(labels[part]) if part in labels else None
        for number, row in enumerate(field(read_json(file), "questions", list, str(file))):
            where = f"{file}, question {number}"
            image, name = field(row, "image_id", int, where), field(row, "question_id", int, where)
            if answers is not None and name not in answers:
                raise TaskError(f"{where} has question_id {name}, which {labels[part]} does not have")
            given, tags = answers[name] if answers is not None else ((), ())
            place = gallery.place(folder / f"COCO_{subset}_{image:012d}.jpg")
            question = Question(field(row, "question", str, where), given, (place,), (), str(name), tags)
            parts.setdefault(part, []).append(question)
    return question_task(root.resolve().name, gallery.files(), "vqa", seed, **parts)


def read_captions(root: Path, images: Path | None, seed: int) -> QuestionTask:
    """Returns the task in a folder of COCO captions, one image a question; in train one caption a question.

    Source: Chen et al., 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server", arXiv 1504.00325.

    Args:
        root: The folder with `annotations/`.
        images: Where the images are, None for root.
        seed: Which images are cut off where there is no val part.

    Raises:
        TaskError: A file is damaged, a caption of an unknown image, or images are missing.
    """
    gallery, parts = Gallery(), Parts()
    for part, file in _by_part(root.glob("annotations/captions_*.json")).items():
        found, folder = read_json(file), _folder(images or root, _subset(file))
        names: dict[int, str] = {}
        for number, row in enumerate(field(found, "images", list, str(file))):
            where = f"{file}, image {number}"
            names[field(row, "id", int, where)] = field(row, "file_name", str, where)
        captions: dict[int, list[str]] = {}
        for number, row in enumerate(field(found, "annotations", list, str(file))):
            where = f"{file}, annotation {number}"
            image = field(row, "image_id", int, where)
            if image not in names:
                raise TaskError(f"{where} is a caption of image {image}, which is not among the file's images")
            captions.setdefault(image, []).append(field(row, "caption", str, where))
        parts[part] = [
            _captioned(said, gallery.place(folder / names[image]), str(image)) for image, said in captions.items()
        ]
    return _caption_task(root, gallery, parts, seed)


def read_karpathy(root: Path, images: Path | None, seed: int) -> QuestionTask:
    """Returns the captions of a `dataset_coco.json`, one image a question; in train one caption a question.

    `restval` belongs to train, as is usual.

    Source: Karpathy and Fei-Fei, 2015, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
    arXiv 1412.2306: the splits.

    Args:
        root: The folder with the file.
        images: Where the folders `train2014` and `val2014` are, None for `images` below root, or root itself.
        seed: Which images are cut off where there is no val part.

    Raises:
        TaskError: The file is damaged, has an unknown split, or images are missing.
    """
    gallery, parts, file = Gallery(), Parts(), root / "dataset_coco.json"
    folder = images or first_folder(root / "images", root)
    for number, row in enumerate(field(read_json(file), "images", list, str(file))):
        where = f"{file}, image {number}"
        path, split = field(row, "filename", str, where), field(row, "split", str, where)
        if split not in _KARPATHY:
            raise TaskError(f"{where} has split {split!r}: it must be one of {', '.join(_KARPATHY)}")
        said = [field(sentence, "raw", str, where) for sentence in field(row, "sentences", list, where)]
        place = gallery.place(folder / optional(row, "filepath", where) / path)
        parts.setdefault(_KARPATHY[split], []).append(_captioned(said, place, Path(path).stem))
    return _caption_task(root, gallery, parts, seed)


def _captioned(captions: list[str], image: int, name: str) -> Question:
    return Question(CAPTION_PROMPT, tuple(captions), (image,), (), name)


def _caption_task(root: Path, gallery: Gallery, parts: Parts, seed: int) -> QuestionTask:
    task = question_task(root.resolve().name, gallery.files(), "cider", seed, **parts)
    if task.train is None:
        return task
    return replace(task, train=tuple(replace(q, answers=(said,)) for q in task.train for said in q.answers))


def _answers(file: Path) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Returns the answers to each question, and their type."""
    found: dict[int, Any] = {}
    for number, row in enumerate(field(read_json(file), "annotations", list, str(file))):
        where = f"{file}, annotation {number}"
        answers = tuple(field(one, "answer", str, where) for one in field(row, "answers", list, where))
        found[field(row, "question_id", int, where)] = answers, (field(row, "answer_type", str, where),)
    return found


def _by_part(files: Iterable[Path]) -> dict[str, Path]:
    """Returns the file of each part. test-dev is part of test, and left out beside it."""
    found: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: ("-dev" in file.name, file.name)):
        match = _SUBSET.search(file.name)
        if match is None:
            raise TaskError(f"{file} does not say in its name whether it is train, val or test")
        part, is_dev = match[1], match[2] is not None
        if part not in found:
            found[part] = file
        elif not is_dev:
            raise TaskError(f"{found[part]} and {file} are both for {part}: keep one of them")
    return found


def _subset(file: Path) -> str:
    """Returns how COCO calls a file's images, e.g. `train2014`."""
    match = _SUBSET.search(file.name)
    assert match is not None
    return f"{match[1]}{match[3] or '2014'}"


def _folder(root: Path, subset: str) -> Path:
    return first_folder(root / subset, root / "images" / subset, root / "images", root)
