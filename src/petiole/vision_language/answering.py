"""What a language model with eyes answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from ..core.prove import eval_mode
from ..errors import FitError, PluginError, TaskError
from ..tasks.question import Question
from ..tasks.task import Images
from ..tasks.transform import Transform
from ..train.world import World
from .album import Album, Look, Seen
from .sighted import Sighted
from .texts import Texts


def answer(
    model: Sighted,
    tokenizer: Any,
    questions: Sequence[Question | str],
    images: Images | Sequence[Image.Image] = (),
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    num_beams: int = 1,
    template: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Returns a model's answers to questions, in their order; leaves the model in the mode it was in.

    Questions of like length share a batch, and each image is seen once, however many questions are about it.

    Args:
        model: A language model with eyes; runs where it is.
        tokenizer: The language model's own.
        questions: Questions, which say by number what images they are about; or texts, each about the image at its
            own place, or all about one. Answers that they may have are not looked at.
        images: Pictures of any size and mode; none for text alone.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer [tokens].
        num_beams: How many beginnings of an answer are followed at a time; 1 takes the likeliest token each time.
        template: What a prompt is made of, with `{question}` where the question goes; None for what the model was
            trained with.
        progress: Called with the number of questions that are answered.

    Raises:
        FitError: A batch does not fit into memory.
        PluginError: The tokenizer is another model's, or a question has more images than the memory holds.
        TaskError: An image cannot be read or does not exist, or a question is longer than the model reads.

    Example:
        >>> import petiole as pt
        >>> model = pt.load_eyes("dots.safetensors", language_model)
        >>> asked = ["which colour is the square ?"]
        >>> (said,) = pt.answer(model, tokenizer, asked, [Image.open("tom.jpg")], max_new_tokens=3)
    """
    asked = _asked(questions, images)
    texts = Texts(tokenizer, model.language_model, model.template if template is None else template)
    prompts = texts.prompts([question.text for question in asked], max_new_tokens)
    check_positions(model, texts, asked, [len(prompt) + max_new_tokens for prompt in prompts])
    if not asked:
        return []
    world = World("fp32")
    look = look_at(model, _Given(images) if isinstance(images, Sequence) else images, asked, world)
    return solve(
        model, texts, prompts, asked, look, world,
        batch_size=batch_size, max_new_tokens=max_new_tokens, num_beams=num_beams, progress=progress,
    )  # fmt: skip


def look_at(
    model: Sighted,
    images: Images,
    questions: Sequence[Question],
    world: World,
    progress: Callable[[int, int], object] | None = None,
) -> Look:
    """Returns what gives a model the images of questions, each seen once and for all.

    Raises:
        PluginError: The model has no eyes for them, or a question has more images than the memory holds.
        TaskError: An image cannot be read.
    """
    check_images(model, questions)
    if model.eyes is None:
        return _Blind()
    like = next(model.eyes.parameters())
    album = Album(images, questions, Transform(model.eyes.model.input_config), like, limit_mib=0)
    return Seen(album, model.eyes, world, progress=progress)


@torch.no_grad()
def check_images(model: Sighted, questions: Sequence[Question]) -> None:
    """Checks that a model takes the images of questions.

    Raises:
        PluginError: It has no eyes for them, or a question has more of them than the memory holds.
    """
    most = max(len(question.images) for question in questions)
    if most and model.eyes is None:
        raise PluginError("the questions have images and the model has no eyes: make it with give_eyes and an encoder")
    if most and model.eyes is not None:
        size = most * model.eyes.num_features
        model.memory(features=torch.zeros(1, size, model.d_image, device=model.language_model.device))


def check_positions(model: Sighted, texts: Texts, questions: Sequence[Question], lengths: Sequence[int]) -> None:
    """Checks that a language model has positions left for the class tokens of questions' images.

    Args:
        model: What reads them.
        texts: Says how many positions there are.
        questions: What has images.
        lengths: How long each question is with its answer [tokens].

    Raises:
        TaskError: A question, its answer and the class tokens are longer than the language model reads.
    """
    if model.class_token is None or texts.limit is None:
        return
    for question, length in zip(questions, lengths, strict=True):
        if length + len(question.images) > texts.limit:
            raise TaskError(
                f"the question {question.text[:60]!r} and its answer have up to {length} tokens, and "
                f"{len(question.images)} in front for its images; the language model has {texts.limit} positions: "
                "shorten it"
            )


@torch.no_grad()
def solve(
    model: Sighted,
    texts: Texts,
    prompts: Sequence[list[int]],
    questions: Sequence[Question],
    look: Look,
    world: World,
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Returns the answers to questions whose prompts are known, in every process.

    Args:
        model: What answers.
        texts: How tokens become text.
        prompts: The questions' tokens.
        questions: What has images.
        look: Gives them.
        world: The processes that share the work, and their precision.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer [tokens].
        num_beams: How many beginnings of an answer are followed at a time.
        progress: Called with the number of this process's questions that are answered.

    Raises:
        FitError: A batch does not fit into memory.
    """
    device = model.language_model.device
    # the longest first: what does not fit shows at once
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
    done = 0
    with eval_mode(model):
        for batch in batches[world.rank :: world.size]:
            arguments = {key: t.to(device) for key, t in texts.to_answer([prompts[i] for i in batch]).items()}
            try:
                with world.autocast():
                    tokens = model.generate(
                        **look.of([questions[i] for i in batch]), **arguments, max_new_tokens=max_new_tokens,
                        num_beams=num_beams, do_sample=False, pad_token_id=texts.pad, eos_token_id=texts.end,
                    )  # fmt: skip
            except torch.OutOfMemoryError as error:
                raise FitError(f"{len(batch)} questions do not fit into memory at once: lower batch_size") from error
            new = texts.new(tokens, arguments)
            answers[batch] = texts.pad
            answers[batch, : new.shape[1]] = new
            done += len(batch)
            if progress is not None:
                progress(done)
    # each row comes from one process and is zero in the others
    return texts.read(world.sum(answers).tolist())


class _Blind:
    """Shows nothing."""

    def of(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        return {}


class _Given:
    """Pictures in memory."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Image.Image:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"image {index}"


def _asked(questions: Sequence[Question | str], images: Images | Sequence[Image.Image]) -> list[Question]:
    """Returns questions whose images exist."""
    num, num_texts = len(images), sum(isinstance(question, str) for question in questions)
    if num_texts and num not in (0, 1, len(questions)):
        raise TaskError(
            f"{len(questions)} texts and {num} images: give each text its own image, or one to all, or questions that "
            "say which images they are about"
        )
    asked = []
    for i, question in enumerate(questions):
        place = () if not num else (0 if num == 1 else i,)
        asked.append(Question(question, images=place) if isinstance(question, str) else question)
        if wrong := [image for image in asked[-1].images if not 0 <= image < num]:
            raise TaskError(f"the question {asked[-1].text!r} is about image {wrong[0]}; there are {num}, from 0")
    return asked
