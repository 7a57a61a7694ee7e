"""Questions on images with their answers, for language models that see.

open_questions("shapes.jsonl.gz", images="shapes.npz")   a row per question, images of a pack or a folder
open_questions("scienceqa/")                             ScienceQA: problems.json, pid_splits.json
open_questions("vqa/")                                   VQAv2: *questions*.json, *annotations*.json
open_questions("coco/")                                  COCO captions: annotations/captions_*.json, dataset_coco.json
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from ..errors import TaskError
from .task import Images

Metric: TypeAlias = Literal["exact", "vqa", "cider"]


@dataclass(frozen=True)
class Question:
    """A question, on an image or without one.

    Args:
        text: What is asked, as the language model reads it, with context and options.
        answers: Reference answers; none where they are not known.
        images: Where its images stand in those of the task.
        options: What a multiple-choice question chooses from; none where the answer is free.
        name: What its source calls it.
        tags: Groups that accuracy is also reported on.
    """

    text: str
    answers: tuple[str, ...] = ()
    images: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    name: str = ""
    tags: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The most frequent answer, of equals the first: what a model is trained to say.

        Raises:
            TaskError: The question has no answer.
        """
        if not self.answers:
            raise TaskError(f"question {self.text!r} has no answer, so that nothing can be trained on it")
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True, eq=False)
class QuestionTask:
    """Questions in up to three splits, and the images they are on.

    Args:
        name: What it is called in tables and files.
        images: The images of all splits, decoded when asked for.
        train: What a plugin is trained on; every question has an answer.
        val: What settings are chosen on.
        test: What is reported, once.
        metric: How answers are scored: `exact` match with a reference, `vqa` accuracy among ten people's answers,
            or `cider` for captions.

    Raises:
        TaskError: No question, an unknown metric, an image that does not exist, or a training question without answer.
    """

    name: str
    images: Images
    train: tuple[Question, ...] | None = field(default=None, repr=False)
    val: tuple[Question, ...] | None = field(default=None, repr=False)
    test: tuple[Question, ...] | None = field(default=None, repr=False)
    metric: Metric = "exact"

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise TaskError(f"{self.name} has the metric {self.metric!r}: known are {', '.join(get_args(Metric))}")
        parts = {"training": self.train, "validation": self.val, "test": self.test}
        if not any(parts.values()):
            raise TaskError(f"{self.name} has no question in any split")
        for part, questions in parts.items():
            if questions is not None and not questions:
                raise TaskError(f"{self.name} has {part} questions, but none in them: pass None for no such split")
            for question in questions or ():
                self._check(part, question)

    def _check(self, part: str, question: Question) -> None:
        wrong = [image for image in question.images if not 0 <= image < len(self.images)]
        if wrong:
            raise TaskError(
                f"the {part} question {question.text!r} of {self.name} is on image {wrong[0]}, but there are "
                f"{len(self.images)}, counted from 0"
            )
        if part == "training" and not question.answers:
            raise TaskError(
                f"the training question {question.text!r} of {self.name} has no answer: only validation and test "
                "questions may go without"
            )


def open_questions(
    source: str | Path, *, images: str | Path | None = None, captions: bool = False, seed: int = 0
) -> QuestionTask:
    """Returns the questions in a file or a folder. No image is decoded.

    A `.jsonl` or `.jsonl.gz` file has a row `{"image", "question", "answer"}` per question. `image` is a path, the
    number of an image in a pack or its id there, a list of these, or null for none; `answer` is a string, a list of
    strings, or null. `split` (train, val or test), `options` (strings) and `id` may be there.

    A folder is ScienceQA where it has `problems.json`, VQAv2 where it has `*questions*.json`, and COCO captions where
    it has `dataset_coco.json` (Karpathy's splits) or `annotations/captions_*.json`, looked for in this order.

    Where a source has no val part, a fifth of the training images, with their questions, becomes val; where it has no
    parts at all, a fifth of all becomes test first. Images that share a question are never torn apart.

    Args:
        source: The file or the folder.
        images: Where the images are: a `.npz` pack with `data`, `offsets` and maybe `ids`, for rows alone, or a
            folder. None for the folder that `source` is, or is in.
        captions: Whether ScienceQA's `captions.json`, what a model said on each image, joins the context.
        seed: Which images are cut off.

    Raises:
        TaskError: Nothing of this kind is there, it is damaged or contradicts itself, or images are missing.
    """
    path = Path(source).expanduser()
    place = None if images is None else Path(images).expanduser()
    if place is not None and not place.exists():
        raise TaskError(f"there is no file or folder {place} to take the images from")
    is_science = (path / "problems.json").is_file()
    if captions and not is_science:
        raise TaskError(f"captions join the context of ScienceQA only, and {path} has no problems.json")
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        from .question_rows import read_rows

        return read_rows(path, place, seed)
    if not path.is_dir():
        raise TaskError(f"there are no questions in {path}: {_LOOKED_FOR}")
    if place is not None and not place.is_dir():
        raise TaskError(f"the images of {path} lie in a folder, got {place}: a pack goes with .jsonl rows")
    if is_science:
        from .science_qa import read_science_qa

        return read_science_qa(path, place, captions, seed)
    return _open_coco(path, place, seed)


def _open_coco(path: Path, images: Path | None, seed: int) -> QuestionTask:
    from .coco import read_captions, read_karpathy, read_vqa

    if any(path.glob("*questions*.json")):
        return read_vqa(path, images, seed)
    if (path / "dataset_coco.json").is_file():
        return read_karpathy(path, images, seed)
    if any(path.glob("annotations/captions_*.json")):
        return read_captions(path, images, seed)
    raise TaskError(f"there are no questions in {path}: {_LOOKED_FOR}")


_LOOKED_FOR = (
    "looked for a file .jsonl or .jsonl.gz and for a folder with problems.json (ScienceQA), *questions*.json (VQAv2), "
    "dataset_coco.json or annotations/captions_*.json (COCO captions)"
)
