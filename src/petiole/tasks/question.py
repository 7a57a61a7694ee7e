"""A question on images, and a task of them."""

from collections import Counter
from dataclasses import dataclass, field
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
