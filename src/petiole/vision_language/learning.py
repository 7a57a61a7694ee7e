"""Trains a language model with eyes to answer questions."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import FitError
from ..tasks.answer_scores import score
from ..tasks.question import Question, QuestionTask
from ..tasks.transform import Transform
from ..train.job import FitResult, Job, carry_out
from ..train.loop import FROM_CODES
from ..train.progress import Progress
from ..train.recipe import Recipe
from ..train.world import World, find_world
from .album import Album, Look
from .answering import check_images, check_positions, look_at
from .eyes_info import describe_eyes, describe_language_model
from .sighted import Sighted
from .steps import AnswerSteps, Quiz, has_trained_eyes
from .texts import TEMPLATE, Exchange, Texts

# an epoch is scored on at most this many validation questions: an answer costs many passes
NUM_VALIDATED = 1000


def answer_recipe(batch_size: int = 32) -> Recipe:
    """Returns the recipe of the paper for a batch size, which its learning rate grows with.

    Source: Jie et al., 2024, arXiv 2405.05615, ScienceQA, as the authors' code has it: 20 epochs, batch 32, learning
    rate 9e-3 * batch / 256, weight decay 0.02, cosine with 2 epochs of warm-up.

    Args:
        batch_size: Questions per step.

    Example:
        >>> answer_recipe().lr
        0.001125
    """
    return Recipe(epochs=20, batch_size=batch_size, lr=9e-3 * batch_size / 256, weight_decay=0.02, warmup_epochs=2)


def fit_answers(
    model: Sighted,
    tokenizer: Any,
    task: QuestionTask,
    recipe: Recipe | None = None,
    *,
    template: str = TEMPLATE,
    out: str | Path | None = None,
    progress: bool = True,
    save_every: float = 60.0,
) -> FitResult:
    """Trains a language model's eyes on questions and answers, and keeps those that answered best on validation.

    What is learnt is to say the answer and to end it; the question itself is not learnt. After an epoch, up to 1,000
    validation questions, the same each time, are answered greedily; at the end every test question. Questions whose
    answers are not known are left out. Where nothing in the eyes is trained, each image is seen once for the whole run.

    The same call with the same `out` goes on where an earlier one was stopped, as in `fit`, also in several processes.

    Args:
        model: A language model with eyes; trained in place, left in eval mode. Its template and the eyes'
            `input_config` become what is said here, so that whatever uses the model or its file asks alike.
        tokenizer: The language model's own, of transformers; never written to.
        task: What `petiole.open_questions` returned.
        recipe: How to train; `augment` must be none. None takes `answer_recipe()`.
        template: What a prompt is made of, with `{question}` where the question goes. ScienceQA's questions are
            prompts already: `"{question}"`.
        out: Run folder, as of `fit`; its plugin file is one of `save_eyes`. None keeps nothing.
        progress: Whether to show how far the run is, on stderr.
        save_every: Time between two writes of the state [s].

    Returns:
        The result: `val_accuracy` and `test_accuracy`, of captions `val_cider` and `test_cider`.

    Raises:
        DivergedError: The loss is no longer finite.
        FitError: Nothing is there to train on or with, or the run folder holds another run.
        PluginError: The tokenizer is another model's, the template has no place for the question, or a question has
            more images than the memory holds.
        TaskError: An image cannot be read, a question is longer than the model reads, or answers cannot be scored.

    Example:
        >>> import petiole as pt
        >>> model = pt.give_eyes(language_model, pt.backbone("micro"), pt.MemVP(slots=64))
        >>> result = pt.fit_answers(model, tokenizer, questions, pt.Recipe(epochs=1), progress=False)

    Differs from the paper: bfloat16 or float32 in place of float16; the learning rate starts from a thousandth of its
    peak and ends at a hundredth, not at zero; the last batch may be smaller; an answer is generated whole, not as one
    letter behind a prompt that says how it begins.
    """
    recipe = recipe or answer_recipe()
    questions = _questions(model, task, recipe)
    texts = Texts(tokenizer, model.language_model, template)
    world = find_world(recipe.precision)
    is_shown = progress and world.rank == 0
    _prepare(model, recipe, template, world)
    # every question and image is read before anything is written
    tokens = {
        name: texts.exchanges([question.text for question in part], [question.target for question in part])
        for name, part in questions.items()
    }
    for name, part in questions.items():
        check_positions(model, texts, part, [len(e.prompt) + len(e.answer) for e in tokens[name]])
    looks = {name: _look(model, task, name, part, world, is_shown) for name, part in questions.items()}
    quizzes = {name: Quiz(part, tokens[name], looks[name]) for name, part in questions.items()}
    train = quizzes.pop("train")
    return carry_out(
        lambda run, state: Job(
            AnswerSteps(model, texts, train, task.metric, recipe, world), quizzes, run, state, save_every
        ),
        _configuration(model, task, questions, tokens, recipe),
        world,
        None if out is None else Path(out),
        type(model.plugin).__name__,
        is_shown=is_shown,
    )


def _questions(model: Sighted, task: QuestionTask, recipe: Recipe) -> dict[str, Sequence[Question]]:
    """Returns the questions that are trained and scored on, by split.

    Raises:
        FitError: There are none to train on, or the recipe asks for what is not done.
        TaskError: Answers cannot be scored.
    """
    if not any(True for _ in model.trained()):
        raise FitError("the model has nothing to train: all its parameters are frozen")
    if task.train is None:
        raise FitError(f"{task.name} has no questions to train on")
    if recipe.augment != "none":
        raise FitError(f"images of questions are not augmented, got augment {recipe.augment!r}: leave it at none")
    train, val = task.train, task.val
    if recipe.train_on == "train+val":
        train, val = (*train, *(val or ())), None
    known = {
        name: [question for question in part or () if question.answers]
        for name, part in (("train", train), ("val", val), ("test", task.test))
    }
    if len(known["val"]) > NUM_VALIDATED:
        chosen = np.random.default_rng(recipe.seed).permutation(len(known["val"]))[:NUM_VALIDATED]
        known["val"] = [known["val"][i] for i in sorted(chosen.tolist())]
    found: dict[str, Sequence[Question]] = {name: part for name, part in known.items() if part}
    for name in found.keys() - {"train"}:
        # what cannot be scored shows now, not after an epoch
        score(task.metric, [question.target for question in found[name]], found[name])
    return found


def _prepare(model: Sighted, recipe: Recipe, template: str, world: World) -> None:
    """Makes the model what recipe and template say, where it will run."""
    model.template = template
    model.set_checkpointing(recipe.checkpoint)
    if model.eyes is not None:
        eyes = model.eyes.model
        if recipe.drop_path is not None:
            eyes.set_drop_path(recipe.drop_path)
        eyes.input_config = eyes.input_config | recipe.input_config(eyes.view.input_config(eyes.backbone))
        if eyes.holds_codes:
            warnings.warn(FROM_CODES, stacklevel=3)
            eyes.release()
    model.to(world.device)


def _look(
    model: Sighted, task: QuestionTask, name: str, questions: Sequence[Question], world: World, is_shown: bool
) -> Look:
    """Returns what gives a split's images: as pixels where the eyes are trained, otherwise seen once and for all."""
    num_images = len({image for question in questions for image in question.images})
    with Progress(f"reading {name} images", num_images, is_shown=is_shown and num_images > 0, is_aside=True) as bar:
        if not has_trained_eyes(model):
            return look_at(model, task.images, questions, world, lambda done, total: bar.at(done))
        check_images(model, questions)
        assert model.eyes is not None
        transform, like = Transform(model.eyes.model.input_config), next(model.eyes.parameters())
        return Album(task.images, questions, transform, like, progress=lambda done, total: bar.at(done))


def _configuration(
    model: Sighted,
    task: QuestionTask,
    splits: Mapping[str, Sequence[Question]],
    tokens: Mapping[str, Sequence[Exchange]],
    recipe: Recipe,
) -> dict[str, Any]:
    """Returns what a run is: questions and answers as tokens, models, plugins, transform and recipe."""
    language_model, eyes = describe_language_model(model.language_model), describe_eyes(model.eyes)
    for described in filter(None, (language_model, eyes)):
        described["fingerprint"] = described["fingerprint"][:16]
    return {
        "petiole": __version__,
        "task": {
            "name": task.name,
            "metric": task.metric,
            **{name: {"questions": len(part), "tokens": _digest(part, tokens[name])} for name, part in splits.items()},
        },
        "language_model": language_model,
        "eyes": eyes,
        "plugin": {"method": model.plugin.method, **model.plugin.settings()},
        "class_token": model.class_token is not None,
        "template": model.template,
        "transform": None if model.eyes is None else dict(model.eyes.model.input_config),
        "recipe": asdict(recipe),
    }


def _digest(questions: Sequence[Question], exchanges: Sequence[Exchange]) -> str:
    """Returns what tells questions on images from others, as their tokens say it."""
    rows = [[q.images, e.prompt, e.answer] for q, e in zip(questions, exchanges, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
