"""The steps of any run: optimiser and schedule, over numbered samples."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ..errors import DivergedError, FitError
from .recipe import Recipe
from .run import Run
from .world import World


class Descent(ABC):
    """Network, optimiser and schedule, which take one step after another.

    What a step does depends on the weights, the optimiser's state, the seed and the step's number alone: a run that
    goes on needs no generator's state.

    Args:
        model: What is trained, on the world's device.
        own: Names in its state dict of all that training changes.
        num_samples: How many samples there are to train on.
        optimizer: Of the model's trained tensors.
        recipe: How.
        world: Where.
    """

    unit: ClassVar[str]
    """What a message calls the samples."""
    criterion = "accuracy"
    """Which score says what the best epoch is."""

    def __init__(
        self,
        model: nn.Module,
        own: set[str],
        num_samples: int,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        world: World,
    ) -> None:
        self.model, self.own, self.recipe, self.world = model, own, recipe, world
        self.num_samples = num_samples
        self.per_epoch = math.ceil(num_samples / recipe.batch_size)
        self.total = recipe.epochs * self.per_epoch
        self.raw = optimizer
        self.schedule = schedule(optimizer, recipe, self.per_epoch)
        self.net, self.optimizer = world.prepare(self.network(), optimizer)

    def network(self) -> nn.Module:
        """Returns the part of the model that a step runs."""
        return self.model

    @abstractmethod
    def loss(self, batch: list[int], step: int) -> Tensor:
        """Returns this process's part of a step's mean loss, scaled so that the processes' mean is the whole.

        Args:
            batch: The samples of the step, of all processes together; a process may have no share of them.
            step: Number of the step.
        """

    @abstractmethod
    def score(self, split: Any) -> dict[str, float]:
        """Returns what the model reaches on a split, with the criterion among it; all processes share the work."""

    @abstractmethod
    def keep(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Writes the plugin file into a run's folder.

        Raises:
            FitError: It cannot be written.
        """

    def take(self, step: int) -> tuple[float, int]:
        """Takes one step and returns the mean loss and the number of samples of the whole batch.

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
            raise FitError(f"{len(batch)} {self.unit} do not fit into memory at once: lower batch_size") from error
        self.optimizer.step()
        return value, len(batch)

    def batch(self, step: int) -> list[int]:
        """Returns the samples of a step, of all processes together."""
        epoch, i = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(self.num_samples)
        return [int(j) for j in order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size]]

    def share(self, batch: list[int]) -> tuple[list[int], bool]:
        """Returns this process's samples of a batch, and whether they are its own.

        A process without a share must take part all the same: it gets one that must not count.
        """
        mine = batch[self.world.rank :: self.world.size]
        return mine or batch[:1], bool(mine)

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
