"""The steps of a run: network, optimiser and schedule."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapted import Adapted
from ..core.plugin import Tuning
from ..core.prove import eval_mode
from ..errors import DivergedError, FitError
from ..tasks.augment import Augmented
from ..tasks.cache import Pixels
from .evaluate import features
from .recipe import Recipe
from .world import World


class Steps:
    """Network, optimiser and schedule, which take one step after another.

    What a step does depends on the weights, the optimiser's state, the seed and the step's number alone: a run that
    goes on needs no generator's state.

    Args:
        model: What is trained, on the world's device.
        train: What it is trained on.
        recipe: How.
        world: Where.
    """

    def __init__(self, model: Adapted, train: Pixels | Augmented, recipe: Recipe, world: World) -> None:
        self.model, self.train, self.recipe, self.world = model, train, recipe, world
        # trained tensors, and the buffers that training may move
        self.own = {*model.task_state(), *(f"backbone.{name}" for name in model.origin)}
        self.per_epoch = math.ceil(len(train) / recipe.batch_size)
        self.total = recipe.epochs * self.per_epoch
        self.is_head_only = _is_head_only(model)
        self._seen: dict[Pixels, Tensor] = {}
        self.raw = torch.optim.AdamW([p for _, p in model.trained()], recipe.lr, weight_decay=recipe.weight_decay)
        self.schedule = schedule(self.raw, recipe, self.per_epoch)
        self.net, self.optimizer = world.prepare(self.network(), self.raw)

    def network(self) -> nn.Module:
        """Returns the part of the model that a step runs."""
        if not self.is_head_only:
            return self.model
        assert self.model.head is not None
        return self.model.head

    def seen(self, pixels: Pixels) -> Tensor | None:
        """Returns what the head sees, where only the head is trained: the backbone's answers then never change."""
        if self.is_head_only and pixels not in self._seen:
            self._seen[pixels] = features(self.model, pixels, self.world)
        return self._seen.get(pixels)

    def take(self, step: int) -> tuple[float, int]:
        """Takes one step and returns the mean loss and the number of images of the whole batch.

        Raises:
            DivergedError: The loss is not finite.
            FitError: The batch does not fit into memory.
        """
        noise = np.random.SeedSequence((self.recipe.seed, step, self.world.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(noise[0]))
        self.schedule.step_update(step)
        self.net.train()
        batch = self.batch(step)
        try:
            loss = self.loss(batch, step)
            value = self.world.sum(loss.detach()).item() / self.world.size
            self._check(value, step)
            self.optimizer.zero_grad()
            self.world.backward(loss)
        except torch.OutOfMemoryError as error:
            raise FitError(f"{len(batch)} images do not fit into memory at once: lower batch_size") from error
        self.optimizer.step()
        return value, len(batch)

    def batch(self, step: int) -> list[int]:
        """Returns the images of a step, of all processes together."""
        epoch, i = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.train))
        return [int(j) for j in order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size]]

    def loss(self, batch: list[int], step: int) -> Tensor:
        """Returns this process's part of a step's mean loss, scaled so that the processes' mean is the whole."""
        mine = batch[self.world.rank :: self.world.size]
        # a process without a share must take part all the same, with weight 0
        rows = mine or batch[:1]
        x, labels = self._inputs(rows, step)
        return self.mean_loss(x, labels, step) * (len(mine) * self.world.size / len(batch))

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

    def state(self) -> dict[str, Any]:
        """Returns weights and the optimiser's state."""
        return {"weights": self.weights(), "optimizer": self.raw.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            FitError: The state belongs to another model.
        """
        self.load(state["weights"])
        self.raw.load_state_dict(state["optimizer"])

    def weights(self) -> dict[str, Tensor]:
        """Returns a copy of everything that training changes."""
        state = self.model.state_dict()
        return {name: t.detach().cpu().clone() for name, t in state.items() if name in self.own}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Writes weights into the model."""
        state = self.model.state_dict()
        if set(weights) != self.own or any(t.shape != state[name].shape for name, t in weights.items()):
            raise FitError("the run's state belongs to another model: remove the run's folder to start afresh")
        self.model.load_state_dict(dict(weights), strict=False)

    def lr(self) -> float:
        """Returns the learning rate of the last step."""
        return float(self.raw.param_groups[0]["lr"])

    def _check(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} at step {step + 1} (epoch {step // self.per_epoch + 1}) with learning rate "
                f"{self.lr():.1e}: lower the learning rate or the plugin's scale"
            )


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, per_epoch: int) -> CosineLRScheduler:
    """Returns linear warm-up from a thousandth of the peak, then a cosine from the peak towards a hundredth of it."""
    warmup = round(recipe.warmup * per_epoch)
    return CosineLRScheduler(
        optimizer, max(1, recipe.epochs * per_epoch - warmup), lr_min=recipe.lr / 100, warmup_t=warmup,
        warmup_lr_init=recipe.lr / 1000, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip


def _is_head_only(model: Adapted) -> bool:
    return all(not plugin.sites and not isinstance(plugin, Tuning) for plugin in model.taps.plugins)
