"""`petiole vqa eval`: score a language model with eyes on questions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _language as lm
from ._options import AsJson, part_of

if TYPE_CHECKING:
    from ..tasks.question import Question, QuestionTask


def evaluate(
    file: lm.EyesFile,
    source: lm.Questions,
    language_model: lm.LanguageModel,
    images: lm.ImagesOfQuestions = None,
    split: lm.Split = "test",
    captions: lm.Captions = False,
    both_captions: Annotated[
        bool, typer.Option("--both-captions", help="Score ScienceQA twice, without captions in the context and with")
    ] = False,
    num_beams: lm.NumBeams = 1,
    max_new_tokens: lm.MaxNewTokens = 32,
    batch_size: lm.BatchSize = 32,
    seed: lm.Seed = 0,
    eyes: lm.OtherEyes = None,
    as_json: AsJson = False,
) -> None:
    """Score a language model with eyes.

    On one split of questions, as a whole and by group, beside the floor: what the most frequent training answers score
    without looking.
    """
    from ..tasks.answer_scores import score
    from ..tasks.questions import open_questions
    from ..train.progress import Progress
    from ..vision_language.answering import answer
    from ..vision_language.eyes_info import inspect_eyes
    from . import _show

    inspect_eyes(file)
    ways = (False, True) if both_captions else (captions,)
    tasks = [open_questions(source, images=images, captions=way, seed=seed) for way in ways]
    asked = [part_of(task, split) for task in tasks]
    model, tokenizer = lm.load_sighted(file, language_model, eyes)
    found: list[dict[str, Any]] = []
    for way, task, questions in zip(ways, tasks, asked, strict=True):
        with Progress("answering", len(questions), is_aside=True) as bar:
            answers = answer(
                model, tokenizer, questions, task.images, batch_size=batch_size, max_new_tokens=max_new_tokens,
                num_beams=num_beams, progress=bar.at,
            )  # fmt: skip
        scores = score(task.metric, answers, questions)
        about = {"task": task.name, "split": split, "captions": way, "questions": len(questions)}
        found.append({**about, "metric": task.metric, "floor": _floor(task, questions), "scores": scores})
    if as_json:
        _show.as_json(found)
        return
    _show.table(
        ("task", "split", "captions", "questions", "without looking", *found[0]["scores"]), [_row(row) for row in found]
    )


def _floor(task: "QuestionTask", questions: Sequence["Question"]) -> float | None:
    """Returns what the most frequent training answers score, None where there are none."""
    from ..tasks.answer_scores import majority_answers, score

    if task.train is None:
        return None
    guess = majority_answers(task.train)
    return score(task.metric, [guess(question) for question in questions], questions)["overall"]


def _row(found: Mapping[str, Any]) -> list[str]:
    def cell(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.3f}" if found["metric"] == "cider" else f"{value:.2%}"

    about = [found["task"], found["split"], "yes" if found["captions"] else "no", str(found["questions"])]
    return [*about, cell(found["floor"]), *map(cell, found["scores"].values())]
