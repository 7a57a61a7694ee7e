"""The steps of a run that learns to answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import FitError, PluginFileError
from ..tasks.answer_scores import score
from ..tasks.question import Metric, Question
from ..train.descent import Descent
from ..train.recipe import Recipe
from ..train.run import PLUGIN, Run
from ..train.world import World
from .album import Album, Look, Seen
from .answering import solve
from .eyes_file import save_eyes
from .sighted import Sighted
from .texts import IGNORED, Exchange, Texts

# Source: Jie et al., 2024, arXiv 2405.05615, as the authors' code has it
BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Quiz:
    """Questions of a split, ready for a model.

    Args:
        questions: The questions.
        exchanges: Their tokens, and those of their answers.
        look: Gives their images.
    """

    questions: Sequence[Question]
    exchanges: Sequence[Exchange]
    look: Look


class AnswerSteps(Descent):
    """Steps of a language model with eyes: of the likelihood of answers, each of their tokens counting alike.

    Args:
        model: What is trained, on the world's device.
        texts: How tokens become text.
        train: What it is trained on.
        metric: How answers are scored.
        recipe: How.
        world: Where.
    """

    unit = "questions"
    model: Sighted

    def __init__(self, model: Sighted, texts: Texts, train: Quiz, metric: Metric, recipe: Recipe, world: World) -> None:
        self.texts, self.train, self.metric = texts, train, metric
        self.criterion = "cider" if metric == "cider" else "accuracy"
        self.num_new = max(len(exchange.answer) for exchange in train.exchanges)
        trained = [p for _, p in model.trained()]
        # biases and gains are not pulled towards zero
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, recipe.lr, betas=BETAS, weight_decay=recipe.weight_decay)
        own = {*model.task_state(), *model.movable()}
        super().__init__(model, own, len(train.questions), optimizer, recipe, world)

    def loss(self, batch: list[int], step: int) -> Tensor:
        rows, is_mine = self.share(batch)
        num_tokens = sum(len(self.train.exchanges[i].answer) for i in batch)
        return self.total_loss(rows) * (is_mine * self.world.size / num_tokens)

    def total_loss(self, rows: Sequence[int]) -> Tensor:
        """Returns the sum of the losses of all tokens that the answers to some questions have."""
        arguments, targets = self.texts.to_learn([self.train.exchanges[i] for i in rows])
        arguments = {key: t.to(self.world.device) for key, t in arguments.items()}
        images = self.train.look.of([self.train.questions[i] for i in rows])
        with self.world.autocast():
            logits = self.net(**images, **arguments, use_cache=False).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten().to(logits.device), ignore_index=IGNORED,
            label_smoothing=self.recipe.label_smoothing, reduction="sum",
        )  # fmt: skip

    def score(self, split: Quiz) -> dict[str, float]:
        look = split.look
        if isinstance(look, Album):
            assert self.model.eyes is not None
            look = Seen(look, self.model.eyes, self.world)
        answers = solve(
            self.model, self.texts, [e.prompt for e in split.exchanges], split.questions, look, self.world,
            batch_size=self.recipe.batch_size, max_new_tokens=self.num_new,
        )  # fmt: skip
        return {self.criterion: score(self.metric, answers, split.questions)["overall"]}

    def keep(self, run: Run, metrics: Mapping[str, float]) -> None:
        try:
            save_eyes(self.model, run.folder / PLUGIN, metrics=metrics)
        except PluginFileError as error:
            raise FitError(str(error)) from error


def has_trained_eyes(model: nn.Module) -> bool:
    """Whether images look different after each step."""
    return any(name.startswith("eyes.") and p.requires_grad for name, p in model.named_parameters())
