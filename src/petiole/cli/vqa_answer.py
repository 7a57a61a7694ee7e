"""`petiole vqa answer`: ask a language model with eyes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _language as lm
from ._options import AsJson, part_of

if TYPE_CHECKING:
    from ..tasks.question import Question
    from ..tasks.task import Images


def answer(
    file: lm.EyesFile,
    source: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Questions, as for eval; answers in them are not looked at")
    ] = None,
    *,
    language_model: lm.LanguageModel,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="What is asked, in place of DATA; repeatable")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Image that every --question is about; repeatable")
    ] = None,
    images: lm.ImagesOfQuestions = None,
    split: lm.Split = "test",
    captions: lm.Captions = False,
    num_beams: lm.NumBeams = 1,
    max_new_tokens: lm.MaxNewTokens = 32,
    batch_size: lm.BatchSize = 32,
    seed: lm.Seed = 0,
    eyes: lm.OtherEyes = None,
    as_json: AsJson = False,
) -> None:
    """Ask a language model with eyes.

    Questions are on images given here, or come from a file.
    """
    from ..tasks.questions import open_questions
    from ..train.progress import Progress
    from ..vision_language.answering import answer as answers_of
    from ..vision_language.eyes_info import inspect_eyes
    from . import _show

    inspect_eyes(file)
    if (source is None) != bool(question):
        raise typer.BadParameter("pass DATA, or --question with --image, not both")
    seen: Images
    if source is None:
        asked, seen = _asked(question or [], image or [])
    else:
        task = open_questions(source, images=images, captions=captions, seed=seed)
        asked, seen = list(part_of(task, split)), task.images
    model, tokenizer = lm.load_sighted(file, language_model, eyes)
    with Progress("answering", len(asked), is_aside=True) as bar:
        answers = answers_of(
            model, tokenizer, asked, seen, batch_size=batch_size, max_new_tokens=max_new_tokens, num_beams=num_beams,
            progress=bar.at,
        )  # fmt: skip
    if as_json:
        rows = zip(asked, answers, strict=True)
        _show.as_json([{"name": q.name, "question": q.text, "answer": said} for q, said in rows])
        return
    _show.table(("question", "answer"), [(q.text, said) for q, said in zip(asked, answers, strict=True)])


def _asked(texts: list[str], paths: list[Path]) -> tuple[list["Question"], "Images"]:
    """Returns questions that are all about the same images."""
    from ..tasks.images import Files, load_images
    from ..tasks.question import Question

    files = load_images(paths) if paths else []
    return [Question(text, images=tuple(range(len(files)))) for text in texts], Files(files)
