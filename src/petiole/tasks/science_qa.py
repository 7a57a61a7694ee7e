"""ScienceQA: multiple-choice questions of school lessons, half of them with an image.

problems.json          {"1": {"question", "choices", "answer", "hint", "image", "subject", "grade", "split", ...}, ...}
pid_splits.json        {"train": ["1", ...], "val": [...], "test": [...]}
images/train/1/...     image `image` of problem 1; also train/1/...
captions.json          {"captions": {"1": "what a model said on the image", ...}}; may be absent

Source: Lu et al., 2022, "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering",
arXiv 2209.09513: the format QCM-A of prompts, and the groups accuracy is reported on.
"""

from pathlib import Path
from typing import Any

from ..errors import TaskError
from .question import Question, QuestionTask
from .question_parts import Gallery, field, first_folder, letter, lettered, optional, question_task, read_json

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LAST_LOWER_GRADE = 6


def read_science_qa(root: Path, images: Path | None, has_captions: bool, seed: int) -> QuestionTask:
    """Returns the task in a folder of ScienceQA.

    Val is `val`, or `minival` where there is none; other parts of `pid_splits.json` are left out.

    Args:
        root: The folder.
        images: Where the folders train, val and test of images are; None for `images` below root, or root itself.
        has_captions: Whether captions join the context.
        seed: Which images are cut off where there is no val part.

    Raises:
        TaskError: A file is missing or damaged, an answer is none of the choices, or images are missing.
    """
    found = _Folder(root, images, has_captions)
    train, val, test = found.questions("train"), found.questions("val"), found.questions("test")
    val = val or found.questions("minival")
    return question_task(root.resolve().name, found.gallery.files(), "exact", seed, train=train, val=val, test=test)


class _Folder:
    def __init__(self, root: Path, images: Path | None, has_captions: bool) -> None:
        self.file, self.parts_file = root / "problems.json", root / "pid_splits.json"
        self.problems, self.parts = read_json(self.file), read_json(self.parts_file)
        self.captions = _captions(root / "captions.json") if has_captions else {}
        self.images = images or first_folder(root / "images", root)
        self.gallery = Gallery()

    def questions(self, part: str) -> list[Question]:
        """Returns the questions of a part, none where there is no such part."""
        listed = field(self.parts, part, list, str(self.parts_file)) if part in self.parts else []
        pids = [str(pid) for pid in listed]
        if unknown := [pid for pid in pids if pid not in self.problems]:
            raise TaskError(f"{self.parts_file} has {unknown[0]!r} in {part}, which {self.file} does not have")
        return [self._question(pid, part) for pid in pids]

    def _question(self, pid: str, part: str) -> Question:
        row, where = self.problems[pid], f"{self.file}, problem {pid}"
        text, answer = field(row, "question", str, where), field(row, "answer", int, where)
        options = [str(option) for option in field(row, "choices", list, where)]
        if not 0 <= answer < len(options):
            raise TaskError(f"{where} has answer {answer}, but {len(options)} choices, counted from 0")
        hint, image, split = (optional(row, key, where) for key in ("hint", "image", "split"))
        context = f"{hint.strip()} {self.captions.get(pid, '').strip()}".strip() or "N/A"
        place = (self.gallery.place(self.images / (split or part) / pid / image),) if image else ()
        return Question(
            f"Question: {text}\nContext: {context}\nOptions: {lettered(options)}\nResponse:",
            (f"The answer is {letter(answer)}.",),
            place,
            tuple(options),
            pid,
            _tags(row, where, bool(hint.strip()), bool(image)),
        )


def _tags(row: dict[str, Any], where: str, has_text: bool, has_image: bool) -> tuple[str, ...]:
    """Returns the groups of the paper's tables that a problem belongs to: subject, context and grades."""
    subject, grade = field(row, "subject", str, where), field(row, "grade", str, where)
    number = grade.removeprefix("grade")
    if subject not in _SUBJECTS or not number.isdecimal():
        raise TaskError(
            f"{where} has subject {subject!r} and grade {grade!r}: a subject is one of {', '.join(_SUBJECTS)}, a grade "
            "from grade1 to grade12"
        )
    context = ("TXT",) * has_text + ("IMG",) * has_image or ("NO",)
    return _SUBJECTS[subject], *context, "G1-6" if int(number) <= _LAST_LOWER_GRADE else "G7-12"


def _captions(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise TaskError(f"there is no {path}: add it, or leave captions out of the context")
    captions = field(read_json(path), "captions", dict, str(path))
    return {pid: field(captions, pid, str, str(path)) for pid in captions}
