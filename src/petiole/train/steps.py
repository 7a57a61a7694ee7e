"""The steps of a run that learns to classify images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapted import Adapted
from ..core.plugin import Tuning
from ..core.prove import eval_mode
from ..tasks.augment import Augmented
from ..tasks.cache import Pixels
from .descent import Descent, schedule
from .evaluate import evaluate, features
from .recipe import Recipe
from .run import Run
from .world import World

__all__ = ["Steps", "schedule"]


class Steps(Descent):
    """Steps of an adapted model on labelled images.

    Args:
        model: What is trained, on the world's device.
        train: What it is trained on.
        recipe: How.
        world: Where.
    """

    unit = "images"
    model: Adapted

    def __init__(self, model: Adapted, train: Pixels | Augmented, recipe: Recipe, world: World) -> None:
        self.train = train
        self.is_head_only = _is_head_only(model)
        self._seen: dict[Pixels, Tensor] = {}
        # trained tensors, and the buffers that training may move
        own = {*model.task_state(), *(f"backbone.{name}" for name in model.origin)}
        optimizer = torch.optim.AdamW([p for _, p in model.trained()], recipe.lr, weight_decay=recipe.weight_decay)
        super().__init__(model, own, len(train), optimizer, recipe, world)

    def network(self) -> nn.Module:
        if not self.is_head_only:
            return self.model
        assert self.model.head is not None
        return self.model.head

    def seen(self, pixels: Pixels) -> Tensor | None:
        """Returns what the head sees, where only the head is trained: the backbone's answers then never change."""
        if self.is_head_only and pixels not in self._seen:
            self._seen[pixels] = features(self.model, pixels, self.world)
        return self._seen.get(pixels)

    def score(self, split: Pixels) -> dict[str, float]:
        return {"accuracy": evaluate(self.model, split, self.world, seen=self.seen(split)).accuracy}

    def keep(self, run: Run, metrics: Mapping[str, float]) -> None:
        run.save_plugin(self.model, metrics)

    def loss(self, batch: list[int], step: int) -> Tensor:
        rows, is_mine = self.share(batch)
        x, labels = self._inputs(rows, step)
        return self.mean_loss(x, labels, step) * (is_mine * len(rows) * self.world.size / len(batch))

    def mean_loss(self, x: Tensor, labels: Tensor, step: int) -> Tensor:
        """Returns the mean loss of what the trained part sees."""
        with self.world.autocast():
            logits = self.net(x)
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(logits.float(), labels.to(self.world.device), label_smoothing=smoothing)

    def _inputs(self, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Returns what the trained part sees of these images, and their labels."""
        if isinstance(self.train, Augmented):
            images, labels = self.train.batch(rows, step)
        elif (seen := self.seen(self.train)) is not None:
            return seen[rows], self.train.labels[rows]
        else:
            images, labels = self.train.batch(rows)
        x = self.train.transform.normalize(images.to(self.world.device))
        if self.is_head_only:
            # images that change are seen anew, by the backbone in eval mode as they would be once
            with eval_mode(self.model), torch.no_grad(), self.world.autocast():
                x = self.model.forward_features(x).float()
        return x, labels


def _is_head_only(model: Adapted) -> bool:
    return all(not plugin.sites and not isinstance(plugin, Tuning) for plugin in model.taps.plugins)
